// SPDX-License-Identifier: Apache-2.0
/*
 * A JSON reader of one pass, without allocation. Input comes from outside: every read is bounded by `end`, and
 * nesting is bounded so that the stack is.
 */
#include "json.h"

#include <string.h>

#define MAX_DEPTH 256

struct reader {
	const unsigned char *at;
	const unsigned char *end;
};

/* Where a string goes while it is read. With data == NULL it is only checked. */
struct sink {
	char *data;
	size_t size;
	size_t used;
	bool usable;
};

static bool read_value(struct reader *r, unsigned int depth);

static void skip_space(struct reader *r)
{
	while (r->at < r->end && (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r'))
		r->at++;
}

static bool take(struct reader *r, char wanted)
{
	if (r->at >= r->end || *r->at != (unsigned char)wanted)
		return false;
	r->at++;
	return true;
}

static void put(struct sink *out, unsigned int byte)
{
	if (!out->data)
		return;
	if (byte == 0 || out->used + 1 >= out->size) {
		out->usable = false;
		return;
	}
	out->data[out->used++] = (char)byte;
}

static void put_code_point(struct sink *out, unsigned int code)
{
	if (code < 0x80) {
		put(out, code);
	} else if (code < 0x800) {
		put(out, 0xc0 | code >> 6);
		put(out, 0x80 | (code & 0x3f));
	} else if (code < 0x10000) {
		put(out, 0xe0 | code >> 12);
		put(out, 0x80 | (code >> 6 & 0x3f));
		put(out, 0x80 | (code & 0x3f));
	} else {
		put(out, 0xf0 | code >> 18);
		put(out, 0x80 | (code >> 12 & 0x3f));
		put(out, 0x80 | (code >> 6 & 0x3f));
		put(out, 0x80 | (code & 0x3f));
	}
}

static bool read_hex4(struct reader *r, unsigned int *code)
{
	*code = 0;
	for (int i = 0; i < 4; i++) {
		if (r->at >= r->end)
			return false;
		unsigned int c = *r->at++;
		if (c >= '0' && c <= '9')
			c -= '0';
		else if (c >= 'a' && c <= 'f')
			c -= 'a' - 10;
		else if (c >= 'A' && c <= 'F')
			c -= 'A' - 10;
		else
			return false;
		*code = *code << 4 | c;
	}
	return true;
}

static bool read_unicode_escape(struct reader *r, struct sink *out)
{
	unsigned int code, low;

	if (!read_hex4(r, &code))
		return false;
	if (code >= 0xd800 && code < 0xdc00 && r->end - r->at >= 2 && r->at[0] == '\\' && r->at[1] == 'u') {
		r->at += 2;
		if (!read_hex4(r, &low))
			return false;
		if (low >= 0xdc00 && low < 0xe000) {
			put_code_point(out, 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00));
			return true;
		}
		out->usable = false;
		return true;
	}
	if (code >= 0xd800 && code < 0xe000) {
		out->usable = false; /* half of a pair: valid JSON grammar, no character */
		return true;
	}
	put_code_point(out, code);
	return true;
}

static bool read_escape(struct reader *r, struct sink *out)
{
	static const char from[] = "\"\\/bfnrt";
	static const char to[] = "\"\\/\b\f\n\r\t";

	if (r->at >= r->end)
		return false;
	unsigned char c = *r->at++;
	if (c == 'u')
		return read_unicode_escape(r, out);
	const char *which = c ? strchr(from, c) : NULL;
	if (!which)
		return false;
	put(out, (unsigned char)to[which - from]);
	return true;
}

static bool read_string(struct reader *r, struct sink *out)
{
	if (!take(r, '"'))
		return false;
	while (r->at < r->end) {
		unsigned char c = *r->at++;
		if (c == '"') {
			if (out->data)
				out->data[out->used] = '\0';
			return true;
		}
		if (c < 0x20)
			return false;
		if (c == '\\') {
			if (!read_escape(r, out))
				return false;
		} else {
			put(out, c);
		}
	}
	return false;
}

static bool skip_string(struct reader *r)
{
	struct sink nowhere = { .data = NULL };

	return read_string(r, &nowhere);
}

static bool read_digits(struct reader *r)
{
	const unsigned char *start = r->at;

	while (r->at < r->end && *r->at >= '0' && *r->at <= '9')
		r->at++;
	return r->at > start;
}

static bool read_number(struct reader *r)
{
	take(r, '-');
	if (!take(r, '0') && !read_digits(r))
		return false;
	if (take(r, '.') && !read_digits(r))
		return false;
	if (take(r, 'e') || take(r, 'E')) {
		if (!take(r, '+'))
			take(r, '-');
		return read_digits(r);
	}
	return true;
}

static bool read_word(struct reader *r, const char *word)
{
	size_t length = strlen(word);

	if ((size_t)(r->end - r->at) < length || memcmp(r->at, word, length) != 0)
		return false;
	r->at += length;
	return true;
}

static bool read_array(struct reader *r, unsigned int depth)
{
	if (!take(r, '['))
		return false;
	skip_space(r);
	if (take(r, ']'))
		return true;
	do {
		if (!read_value(r, depth))
			return false;
		skip_space(r);
	} while (take(r, ','));
	return take(r, ']');
}

/* Reads one member's value: into `wanted` if it is a string that was asked for. */
static bool read_member(struct reader *r, struct json_member *wanted, unsigned int depth)
{
	if (!wanted)
		return read_value(r, depth);
	wanted->found = true;
	wanted->usable = false;
	skip_space(r);
	if (r->at >= r->end || *r->at != '"')
		return read_value(r, depth);
	struct sink out = { .data = wanted->value, .size = wanted->size, .usable = true };
	if (!read_string(r, &out))
		return false;
	wanted->usable = out.usable;
	return true;
}

static struct json_member *find_member(struct json_member *members, size_t count, const char *key)
{
	for (size_t i = 0; i < count; i++)
		if (strcmp(members[i].key, key) == 0)
			return &members[i];
	return NULL;
}

static bool read_object(struct reader *r, struct json_member *members, size_t count, unsigned int depth)
{
	char key[64];

	if (!take(r, '{'))
		return false;
	skip_space(r);
	if (take(r, '}'))
		return true;
	do {
		struct sink name = { .data = key, .size = sizeof(key), .usable = true };
		skip_space(r);
		if (!read_string(r, &name))
			return false;
		skip_space(r);
		if (!take(r, ':'))
			return false;
		if (!read_member(r, name.usable ? find_member(members, count, key) : NULL, depth))
			return false;
		skip_space(r);
	} while (take(r, ','));
	return take(r, '}');
}

static bool read_value(struct reader *r, unsigned int depth)
{
	skip_space(r);
	if (r->at >= r->end || depth == 0)
		return false;
	switch (*r->at) {
	case '{':
		return read_object(r, NULL, 0, depth - 1);
	case '[':
		return read_array(r, depth - 1);
	case '"':
		return skip_string(r);
	case 't':
		return read_word(r, "true");
	case 'f':
		return read_word(r, "false");
	case 'n':
		return read_word(r, "null");
	default:
		return read_number(r);
	}
}

bool json_read_object(const char *text, size_t length, struct json_member *members, size_t count)
{
	struct reader r = { .at = (const unsigned char *)text, .end = (const unsigned char *)text + length };

	skip_space(&r);
	if (!read_object(&r, members, count, MAX_DEPTH))
		return false;
	skip_space(&r);
	return r.at == r.end;
}

size_t json_quote(char *out, size_t size, const char *text)
{
	static const char hex[] = "0123456789abcdef";
	size_t used = 0;

	if (size < 3)
		return 0;
	out[used++] = '"';
	for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
		if (used + 6 + 2 > size) /* the longest escape, the closing quote, the NUL */
			break;
		if (*c == '"' || *c == '\\') {
			out[used++] = '\\';
			out[used++] = (char)*c;
		} else if (*c < 0x20 || *c >= 0x7f) {
			/* Bytes that may not be UTF-8 become characters of the same number: always valid JSON. */
			memcpy(out + used, "\\u00", 4);
			out[used + 4] = hex[*c >> 4];
			out[used + 5] = hex[*c & 15];
			used += 6;
		} else {
			out[used++] = (char)*c;
		}
	}
	out[used++] = '"';
	out[used] = '\0';
	return used;
}
