/* SPDX-License-Identifier: Apache-2.0 */
/* Just enough JSON for the plugin: checks that a text is one JSON object, and finds top-level strings in it. */
#ifndef WAGGLE_CNI_JSON_H
#define WAGGLE_CNI_JSON_H

#include <stdbool.h>
#include <stddef.h>

/* A top-level member to find. The last one counts where a key is repeated, as in other JSON readers. */
struct json_member {
	const char *key;
	char *value;	 /* the decoded string, NUL-terminated */
	size_t size;	 /* of value, the NUL included */
	bool found;	 /* the key exists */
	bool usable;	 /* its value is a string that fits and holds no NUL */
};

/* True if text is one valid JSON object, with nothing but white space around it. Fills the members. */
bool json_read_object(const char *text, size_t length, struct json_member *members, size_t count);

/* Writes text as a JSON string, quotes included, into out. Cuts what does not fit. Returns the length. */
size_t json_quote(char *out, size_t size, const char *text);

#endif
