/* SPDX-License-Identifier: Apache-2.0 */
/* What the plugin and its loopback part share. */
#ifndef WAGGLE_CNI_PLUGIN_H
#define WAGGLE_CNI_PLUGIN_H

#include <stddef.h>

enum cni_code {
	CNI_INCOMPATIBLE_VERSION = 1,
	CNI_UNSUPPORTED_FIELD = 2,
	CNI_UNKNOWN_CONTAINER = 3,
	CNI_INVALID_ENVIRONMENT = 4,
	CNI_IO_FAILURE = 5,
	CNI_DECODING_FAILURE = 6,
	CNI_INVALID_CONFIG = 7,
	CNI_TRY_AGAIN_LATER = 11,
	CNI_NOT_AVAILABLE = 50,
};

/* Prints an error object and exits with 1. The format makes `msg`. */
__attribute__((format(printf, 2, 3), noreturn)) void fail(enum cni_code code, const char *format, ...);

/* Prints the answer and exits with 0. */
__attribute__((noreturn)) void succeed(const char *answer, size_t length);

/*
 * The plugin "loopback": brings lo up in the namespace CNI_NETNS. Does `command` for a configuration of the CNI version
 * `version`, and exits.
 */
__attribute__((noreturn)) void loopback(const char *command, const char *version);

#endif
