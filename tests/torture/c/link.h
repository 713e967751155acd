/* A connection: bytes to send, bytes received, and how its owner likes to read and write. Knows no
 * HTTP. Non-blocking; one poll at a time in `link_step`.
 */
#pragma once
#include "stream.h"
#include <fcntl.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#define ROOM (512 << 10)
#define TCP_TIME_WAIT 6 /* linux/tcp.h and netinet/tcp.h do not go together */
#define LIMIT_MS 30000 /* without any progress: a hang */

enum habit {
	READ,	/* recv as much as there is room for */
	ASK,	/* FIONREAD first, then exactly that */
	PEEK,	/* MSG_PEEK first */
	SPLICE, /* splice(2) through a pipe, both ways */
};

struct link {
	int fd, pipe_in[2], pipe_out[2];
	enum habit habit;
	uint64_t random;
	uint64_t since;
	uint64_t resume_ns;	     /* it does not read before that */
	size_t read_max, write_max;  /* of one system call */
	size_t in_from, in_to, out_from, out_to, piped;
	uint64_t received;	     /* bytes read from the socket */
	bool ended;		     /* nothing more comes: the far end's FIN or RST */
	bool unwritable, asked_wrong, redirected;
	int error;
	uint8_t in[ROOM], out[ROOM];
};

/* Connections, by how their first bytes came. */
static _Atomic uint64_t by_redirect, by_tcp;

static struct link *link_new(int fd, enum habit habit, uint64_t random)
{
	struct link *link = malloc(sizeof(*link));

	if (!link)
		die("malloc");
	memset(link, 0, offsetof(struct link, in));
	link->fd = fd;
	link->habit = habit;
	link->random = random;
	link->since = now_ns();
	link->read_max = link->write_max = ROOM;
	if (habit == SPLICE && (pipe2(link->pipe_in, O_NONBLOCK) || pipe2(link->pipe_out, O_NONBLOCK)))
		die("pipe2");
	fcntl(fd, F_SETFL, O_NONBLOCK);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){ 1 }, sizeof(int));
	return link;
}

/* Says "MIXED ..." of a connection that had bytes both ways, which the one rule forbids.
 *
 * TCP does not count bytes that came by redirect, so its own count says which way they took. A FIN
 * counts as one byte; in the states from TIME_WAIT on there may have been one. */
static void link_count(struct link *link, bool first)
{
	struct tcp_info info = { 0 };
	socklen_t size = sizeof(info);

	if (!link->received || getsockopt(link->fd, IPPROTO_TCP, TCP_INFO, &info, &size))
		return;
	if (first) {
		link->redirected = info.tcpi_bytes_received <= (info.tcpi_state >= TCP_TIME_WAIT);
		if (link->redirected)
			by_redirect++;
		else
			by_tcp++;
	} else if (link->redirected ? info.tcpi_bytes_received > 1
				    : info.tcpi_bytes_received < link->received) {
		say("MIXED %llu bytes were read, %llu came by TCP, of a connection that began by %s; "
		    "state %u, error %d, opened %llu ms ago",
		    (unsigned long long)link->received,
		    (unsigned long long)info.tcpi_bytes_received,
		    link->redirected ? "redirect" : "TCP", info.tcpi_state, link->error,
		    (unsigned long long)(now_ns() - link->since) / 1000000);
	}
}

static void link_close(struct link *link, bool reset)
{
	link_count(link, false);
	if (reset)
		setsockopt(link->fd, SOL_SOCKET, SO_LINGER, &(struct linger){ 1, 0 },
			   sizeof(struct linger));
	close(link->fd);
	for (int i = 0; i < 2 && link->habit == SPLICE; i++) {
		close(link->pipe_in[i]);
		close(link->pipe_out[i]);
	}
	free(link);
}

static bool link_sent(const struct link *link)
{
	return link->out_from == link->out_to && !link->piped;
}

static void link_flush(struct link *link)
{
	ssize_t n;

	if (link->habit == SPLICE) {
		if (!link->piped) {
			size_t count = link->out_to - link->out_from;

			n = write(link->pipe_out[1], link->out + link->out_from,
				  count < BLOCK / 2 ? count : BLOCK / 2);
			if (n < 0)
				die("write to a pipe");
			link->piped = n;
			link->out_from += n;
		}
		n = splice(link->pipe_out[0], NULL, link->fd, NULL, link->piped,
			    SPLICE_F_NONBLOCK);
		if (n > 0)
			link->piped -= n;
	} else {
		size_t count = link->out_to - link->out_from;
		size_t most = 1 + below(&link->random, link->write_max);

		n = send(link->fd, link->out + link->out_from, count < most ? count : most,
			 MSG_NOSIGNAL);
		if (n > 0)
			link->out_from += n;
	}
	if (n < 0 && errno != EAGAIN) {
		/* What the far end said before it closed can still be read. */
		link->unwritable = true;
		link->error = errno;
		link->out_from = link->out_to = link->piped = 0;
	}
}

static ssize_t take(struct link *link, uint8_t *to, size_t room)
{
	ssize_t n;
	int there;

	switch (link->habit) {
	case ASK:
		if (ioctl(link->fd, FIONREAD, &there))
			return -1;
		n = recv(link->fd, to, there == 0 ? 1 : (size_t)there < room ? (size_t)there : room, 0);
		/* It was readable, so no bytes can only mean the end. */
		if (there == 0 && n > 0)
			link->asked_wrong = true;
		return n;
	case PEEK:
		n = recv(link->fd, to, room, MSG_PEEK);
		return n > 0 ? recv(link->fd, to, n, 0) : n;
	case SPLICE:
		n = splice(link->fd, NULL, link->pipe_in[1], NULL,
			   room < BLOCK / 2 ? room : BLOCK / 2,
			   SPLICE_F_NONBLOCK);
		return n > 0 ? read(link->pipe_in[0], to, n) : n;
	default:
		return recv(link->fd, to, room, 0);
	}
}

static void link_fill(struct link *link)
{
	if (link->in_from) {
		memmove(link->in, link->in + link->in_from, link->in_to - link->in_from);
		link->in_to -= link->in_from;
		link->in_from = 0;
	}

	size_t room = ROOM - link->in_to;
	size_t most = 1 + below(&link->random, link->read_max);
	ssize_t n = take(link, link->in + link->in_to, room < most ? room : most);

	if (n > 0) {
		link->in_to += n;
		link->received += n;
		if (link->received == (uint64_t)n)
			link_count(link, true);
	} else if (n == 0) {
		link->ended = true;
	} else if (errno != EAGAIN) {
		link->ended = true;
		link->error = errno;
	}
}

/* Wait until something can be done, and do it. `reading`: more bytes are wanted now. False: nothing
 * happened for too long. */
static bool link_step(struct link *link, bool reading, int limit_ms)
{
	uint64_t now = now_ns();
	bool paused = reading && now < link->resume_ns;
	struct pollfd poll_fd = { .fd = link->fd };

	if (reading && !paused && !link->ended)
		poll_fd.events |= POLLIN;
	if (!link_sent(link) && !link->unwritable)
		poll_fd.events |= POLLOUT;

	int count = poll(&poll_fd, 1, paused ? (int)((link->resume_ns - now) / 1000000 + 1) : limit_ms);

	if (count == 0)
		return paused;
	if (poll_fd.revents & POLLOUT)
		link_flush(link);
	if (poll_fd.revents & POLLIN)
		link_fill(link);
	else if (poll_fd.revents & (POLLERR | POLLHUP)) {
		/* Reset. There may be bytes before it, for who wants them. */
		link->resume_ns = 0;
		if (reading && !link->ended)
			link_fill(link);
		else
			link->ended = link->unwritable = true;
	}
	return true;
}
