/* What is sent: for each key a pseudo-random stream that both ends can produce at the speed of
 * memcpy. One random block of 64 KiB, and each 64 KiB of a stream is that block rotated by a hash
 * of key and place; so bytes that are lost, repeated, or another stream's do not go unseen.
 */
#pragma once
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 65536
#define STREAM_SEED 1 /* the same in all programs */

static uint8_t block[2 * BLOCK];

static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u; /* splitmix64 */
	x = (x ^ x >> 27) * 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

static uint64_t draw(uint64_t *random)
{
	return mix(*random += 0x9e3779b97f4a7c15u);
}

static uint64_t below(uint64_t *random, uint64_t limit)
{
	return draw(random) % limit;
}

static bool chance(uint64_t *random, unsigned percent)
{
	return below(random, 100) < percent;
}

/* 1 to 1 << bits, each power of two as likely as the other. */
static uint64_t some_size(uint64_t *random, unsigned bits)
{
	uint64_t power = 1ull << below(random, bits);

	return power + below(random, power) + below(random, 2);
}

static void stream_init(uint64_t seed)
{
	for (size_t i = 0; i < BLOCK; i++)
		block[i] = block[BLOCK + i] = draw(&seed) >> 7;
}

/* The stream's bytes at a place, as many as lie in one piece. */
static const uint8_t *stream_at(uint64_t key, uint64_t place, size_t *run)
{
	*run = BLOCK - place % BLOCK;
	return block + mix(key + mix(place / BLOCK + 1)) % BLOCK + place % BLOCK;
}

static void stream_copy(uint64_t key, uint64_t place, uint8_t *to, size_t count)
{
	for (size_t run; count; place += run, to += run, count -= run) {
		const uint8_t *from = stream_at(key, place, &run);

		if (run > count)
			run = count;
		memcpy(to, from, run);
	}
}

/* How many bytes are as they should be, up to the first that is not. */
static size_t stream_same(uint64_t key, uint64_t place, const uint8_t *data, size_t count)
{
	size_t same = 0;

	for (size_t run; same < count; same += run) {
		const uint8_t *from = stream_at(key, place + same, &run);

		if (run > count - same)
			run = count - same;
		if (memcmp(from, data + same, run)) {
			while (*from++ == data[same])
				same++;
			break;
		}
	}
	return same;
}

/* Where in the stream some bytes stand, -1 where they do not. */
static int64_t stream_find(uint64_t key, uint64_t size, const uint8_t *data, size_t count)
{
	for (uint64_t place = 0; place < size; place += BLOCK) {
		size_t run;
		const uint8_t *from = stream_at(key, place, &run);
		const uint8_t *found = memmem(from, BLOCK, data, count);

		if (found)
			return place + (found - from);
	}
	return -1;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

/* One line for whoever runs this; lines of several threads do not mix. */
__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	char line[1024];
	va_list values;

	va_start(values, format);
	int length = vsnprintf(line, sizeof(line) - 1, format, values);
	va_end(values);
	if (length > (int)sizeof(line) - 2)
		length = sizeof(line) - 2;
	line[length] = '\n';
	if (write(1, line, length + 1) < 0)
		_exit(1);
}

__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *format, ...)
{
	va_list values;

	va_start(values, format);
	vfprintf(stderr, format, values);
	va_end(values);
	fprintf(stderr, ": %s\n", strerror(errno));
	exit(1);
}
