// SPDX-License-Identifier: Apache-2.0
// Latencies in buckets whose width is 1/32 of their value: constant memory, no allocation, about 3 % of error.
#pragma once

#include <stdint.h>

#define HISTOGRAM_BITS 5
#define HISTOGRAM_BUCKETS (64 << HISTOGRAM_BITS)

struct histogram {
	uint64_t total;
	uint64_t count[HISTOGRAM_BUCKETS];
};

static inline unsigned histogram_bucket(uint64_t value)
{
	unsigned exponent;

	if (value < (1u << HISTOGRAM_BITS))
		return (unsigned)value;
	exponent = 63u - (unsigned)__builtin_clzll(value) - HISTOGRAM_BITS;
	return ((exponent + 1) << HISTOGRAM_BITS) + (unsigned)((value >> exponent) & ((1u << HISTOGRAM_BITS) - 1));
}

// The middle of a bucket.
static inline double histogram_value(unsigned bucket)
{
	unsigned exponent = bucket >> HISTOGRAM_BITS;
	uint64_t mantissa = bucket & ((1u << HISTOGRAM_BITS) - 1);

	if (!exponent)
		return (double)mantissa;
	return ((double)(mantissa + (1u << HISTOGRAM_BITS)) + 0.5) * (double)(1ull << (exponent - 1));
}

static inline void histogram_add(struct histogram *histogram, uint64_t value)
{
	histogram->total++;
	histogram->count[histogram_bucket(value)]++;
}

static inline double histogram_quantile(const struct histogram *histogram, double quantile)
{
	uint64_t rank = (uint64_t)((double)histogram->total * quantile), seen = 0;

	for (unsigned bucket = 0; bucket < HISTOGRAM_BUCKETS; bucket++) {
		seen += histogram->count[bucket];
		if (seen > rank)
			return histogram_value(bucket);
	}
	return 0;
}
