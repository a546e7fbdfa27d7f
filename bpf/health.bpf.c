// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * No program: the tables between the agent and waggle-health, made and pinned as all others are.
 */
#include "waggle/health_maps.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";
