# SPDX-License-Identifier: Apache-2.0
# How the static C programs of the package are compiled. Needs a C compiler and a static C library (Debian: gcc, libc6-dev).

ifeq ($(origin CC),default)
CC := gcc
endif
CFLAGS ?= -Os
WARNINGS := -std=gnu11 -Wall -Wextra -Werror -Wshadow -Wformat=2 -Wstrict-prototypes
HARDENING := -ffunction-sections -fdata-sections -fstack-protector-strong
