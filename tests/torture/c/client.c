/* client NUMBER SEED CONNECTIONS TARGET...: transfers over so many connections at once, until
 * SIGTERM, which lets those under way end. A target is HOST/PORT/LETTERS, where the letters say
 * what may be asked of it: d to answer while the request comes, p pipelining, b to break things
 * itself, h to bear a half close; and f that it serves files instead of plans.
 * client files DIRECTORY: makes those files.
 *
 * Says, each half second and at the end, "transfers COMPLETE BROKEN WRONG BYTES R T" (BROKEN: on
 * purpose; R, T: connections by redirect and by TCP, see link_count); and one line for each
 *     WRONG TARGET ID WHY
 *     LOST SINCE AT TARGET ID WHY     a connection opened at SINCE broke at AT, in nanoseconds of
 *                                     CLOCK_MONOTONIC, though nobody meant it to
 */
#include "link.h"
#include "message.h"
#include <arpa/inet.h>
#include <netdb.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>

#define WINDOW 8
#define FILES 13
#define FILE_KEY (1ull << 62)
#define TARGETS 64

struct target {
	char name[64], letters[8];
	struct addrinfo *addresses[8];
	unsigned count;
};

enum fate {
	COMPLETE,
	HALF_CLOSE,
	BACKEND_BREAKS,
	RESET_SENDING,
	RESET_RECEIVING,
	CLOSE_RECEIVING,
};

struct transfer {
	struct plan plan;
	enum fate fate;
	uint64_t fate_at; /* bytes of the body it concerns */
	bool close, put, headed, closed, last;
	int file; /* -1: none */
	uint64_t pause_at;
	unsigned pause_ms;
	struct outlet outlet;
	struct intake intake;
};

/* One connection; transfers are numbered from 0 in the order of their requests. */
struct session {
	struct link *link;
	const struct target *target;
	uint64_t *random, since;
	unsigned window, total, planned, sent, received;
	bool shut;
	struct transfer transfers[WINDOW];
};

static struct target targets[TARGETS];
static unsigned target_count, number;
static _Atomic uint64_t next_id, complete, broken, wrong, bytes;
static atomic_bool stopping;

static bool may(const struct session *session, char letter)
{
	return strchr(session->target->letters, letter);
}

static unsigned some_pause_ms(uint64_t *random)
{
	return chance(random, 10) ? 500 + below(random, 2000) : some_size(random, 6);
}

static void plan_file(struct session *session, struct transfer *t)
{
	unsigned first = below(session->random, FILES), second = below(session->random, FILES);

	t->file = first < second ? first : second;
	t->plan.request = 0;
	t->plan.response = (1ull << 2 * t->file) + t->file;
	t->intake.key = FILE_KEY + t->file;
}

static void plan_fate(struct session *session, struct transfer *t)
{
	uint64_t *random = session->random;
	static const enum fate fates[] = { HALF_CLOSE,	    RESET_SENDING,  RESET_RECEIVING,
					   CLOSE_RECEIVING, BACKEND_BREAKS, BACKEND_BREAKS,
					   BACKEND_BREAKS };

	t->fate = fates[below(random, may(session, 'b') ? 7 : 4)];
	if ((t->fate == HALF_CLOSE && !may(session, 'h')) ||
	    (t->fate == RESET_SENDING && !t->plan.request))
		t->fate = RESET_RECEIVING;
	t->last = true;
	t->fate_at = below(random, t->fate == RESET_SENDING ? t->plan.request : t->plan.response);
	if (t->fate == BACKEND_BREAKS) {
		t->plan.end = EARLY + below(random, 3);
		t->plan.end_at = below(random, t->plan.end == RESET ? t->plan.response
								     : t->plan.request);
		/* Polite enough that the answer must arrive. */
		if (t->plan.end == EARLY)
			t->fate = COMPLETE;
	}
}

static void plan_transfer(struct session *session)
{
	struct transfer *t = &session->transfers[session->planned++ % WINDOW];
	uint64_t *random = session->random;
	/* A sixteenth is large, so that there are many in a minute. */
	unsigned bits[2] = { 24, 24 };

	for (int i = 0; i < 2; i++)
		if (!chance(random, 7))
			bits[i] = chance(random, 50) ? 16 : 10;
	memset(t, 0, sizeof(*t));
	t->file = -1;
	t->plan.id = (uint64_t)number << 40 | ++next_id;
	t->plan.request = some_size(random, bits[0]);
	t->plan.response = some_size(random, bits[1]);
	t->intake.key = 2 * t->plan.id + 1;
	if (may(session, 'f'))
		plan_file(session, t);
	t->plan.chunked = chance(random, 50);
	t->plan.at_once = may(session, 'd') && chance(random, 30);
	t->plan.piece_max = some_size(random, 16) + t->plan.response / 1000;
	t->pause_at = t->plan.pause_at = ~0ull;
	if (chance(random, 4)) {
		t->pause_at = below(random, t->plan.response);
		t->pause_ms = some_pause_ms(random);
	}
	if (chance(random, 4)) {
		t->plan.pause_at = t->plan.request / 2;
		t->plan.pause_ms = some_pause_ms(random);
	}
	t->intake.size = t->plan.response;
	t->outlet = (struct outlet){ .key = 2 * t->plan.id,
				     .size = t->plan.request,
				     .chunked = chance(random, 50),
				     .piece_max = some_size(random, 16) + t->plan.request / 1000 };
	t->last = session->planned == session->total;
	t->close = t->last && chance(random, 25);
	/* Most are as most requests are, so that many pass by the proxy. */
	if (chance(random, 75)) {
		t->plan.chunked = t->plan.at_once = t->outlet.chunked = false;
		t->plan.piece_max = t->outlet.piece_max = ROOM / 4;
	}
	if (chance(random, 6))
		plan_fate(session, t);
	if (t->last)
		session->total = session->planned;
}

/* What of the requests fits into the link, which has sent all that it had. */
static void put_requests(struct session *session)
{
	struct link *link = session->link;

	link->out_from = link->out_to = 0;
	while (session->sent < session->planned && link->out_to < ROOM / 2) {
		struct transfer *t = &session->transfers[session->sent % WINDOW];
		bool stops = t->fate == RESET_SENDING;

		if (!t->put) {
			char framing[64] = "transfer-encoding: chunked", *to = (char *)link->out;
			const struct plan *p = &t->plan;

			t->put = true;
			link->write_max = t->outlet.piece_max;
			if (!t->outlet.chunked)
				sprintf(framing, "content-length: %llu", p->request);
			to += link->out_to;
			if (t->file >= 0) {
				link->out_to += sprintf(to,
							"GET /f/%d HTTP/1.1\r\nhost: %s\r\n"
							"x-id: %llu\r\n%s\r\n",
							t->file, session->target->name, p->id,
							t->close ? "connection: close\r\n" : "");
				session->sent++;
				continue;
			}
			link->out_to += sprintf(
				to,
				"POST /t/%llu HTTP/1.1\r\nhost: %s\r\n%s\r\nx-plan: " PLAN_FORMAT
				"\r\n%s\r\n",
				p->id, session->target->name, framing, p->id, p->request,
				p->response, p->chunked, p->at_once, p->end, p->end_at,
				p->pause_at, p->pause_ms, p->piece_max,
				t->close ? "connection: close\r\n" : "");
		}
		link->out_to += outlet_next(&t->outlet, link->out + link->out_to,
					    stops ? t->fate_at : t->plan.request, &link->random);
		if (stops && t->outlet.sent == t->fate_at)
			return;
		session->sent += t->outlet.ended;
	}
}

static bool is_wrong(const struct session *session, const struct transfer *t, const char *why)
{
	wrong++;
	say("WRONG %s %llu %s (request %llu of %llu%s sent, response %llu of %llu%s, transfer %u of "
	    "the connection, window %u, habit %d, fate %d, end %u)",
	    session->target->name, t->plan.id, why, (unsigned long long)t->outlet.sent,
	    t->plan.request, t->outlet.chunked ? " chunked" : "", (unsigned long long)t->intake.got,
	    t->plan.response, t->intake.framing == CHUNKED ? " chunked" : "", session->received + 1,
	    session->window, session->link->habit, t->fate, t->plan.end);
	return false;
}

/* The connection ends before all was received. Always false. */
static bool ends_early(struct session *session, bool on_purpose, const char *why)
{
	const struct transfer *t = &session->transfers[session->received % WINDOW];

	for (unsigned i = session->received; i < session->planned; i++)
		on_purpose |= session->transfers[i % WINDOW].fate == BACKEND_BREAKS;
	if (on_purpose)
		broken += session->planned - session->received;
	else
		say("LOST %llu %llu %s %llu %s (request %llu of %llu sent, response %llu of %llu, "
		    "transfer %u of the connection, window %u, habit %d, fate %d, end %u)",
		    (unsigned long long)session->since, (unsigned long long)now_ns(),
		    session->target->name, t->plan.id, why, (unsigned long long)t->outlet.sent,
		    t->plan.request, (unsigned long long)t->intake.got, t->plan.response,
		    session->received + 1, session->window, session->link->habit, t->fate,
		    t->plan.end);
	return false;
}

/* A response's head. False: the connection is of no more use. */
static bool take_head(struct session *session, struct transfer *t, const struct head *head)
{
	const char *id = head_field(head, "\nx-id:");
	char why[400];
	int status = 0;

	sscanf(head->text, "HTTP/1.1 %d ", &status);
	if (status != 200 || !id || strtoull(id, NULL, 10) != t->plan.id) {
		snprintf(why, sizeof(why), "answered with: %.300s", head->text);
		for (char *c = why; *c; c++)
			if (*c == '\r' || *c == '\n')
				*c = ' ';
		/* So says a proxy where the connection behind it broke. */
		if (status == 502 || status == 503)
			return ends_early(session, t->fate == BACKEND_BREAKS, why);
		return is_wrong(session, t, why);
	}
	t->headed = true;
	t->closed = field_is(head_field(head, "\nconnection:"), "close");
	session->link->read_max = 1 + t->plan.response / 1000 + some_size(session->random, 18);
	intake_begin(&t->intake, head, false);
	return true;
}

/* What has come of the responses. False: the connection is of no more use. */
static bool take_responses(struct session *session)
{
	struct link *link = session->link;

	while (session->received < session->planned) {
		struct transfer *t = &session->transfers[session->received % WINDOW];
		const uint8_t *data = link->in + link->in_from;
		size_t count = link->in_to - link->in_from, used;
		struct head head;

		if (!t->headed) {
			if (!head_take(&head, data, count, &used))
				return true;
			link->in_from += used;
			if (!take_head(session, t, &head))
				return false;
			continue;
		}
		link->in_from += intake_take(&t->intake, data, count);
		if (*t->intake.wrong)
			return is_wrong(session, t, t->intake.wrong);
		if (t->intake.got >= t->pause_at && t->pause_ms) {
			link->resume_ns = now_ns() + t->pause_ms * 1000000ull;
			t->pause_ms = 0;
		}
		if (t->intake.framing == UNTIL_END && link->ended && !link->error)
			t->intake.done = t->intake.got == t->intake.size;
		if (!t->intake.done)
			return true;
		if (t->plan.end == ABRUPT)
			return ends_early(session, true, "");
		if (session->sent == session->received && t->plan.end != EARLY)
			return is_wrong(session, t, "the response ended before the request did");
		session->received++;
		complete++;
		bytes += t->plan.response + t->outlet.sent;
		if (t->closed && session->received < session->planned)
			return ends_early(session, false, "the response says that it is the last");
		if (t->closed)
			session->total = session->planned;
		if (t->plan.end == EARLY)
			return false;
	}
	return true;
}

/* Whether it is time for this client to break the connection; `reset` says how. */
static bool breaks(const struct session *session, bool *reset)
{
	const struct transfer *sending = &session->transfers[session->sent % WINDOW];
	const struct transfer *receiving = &session->transfers[session->received % WINDOW];

	*reset = true;
	if (session->sent < session->planned && sending->fate == RESET_SENDING && sending->put &&
	    sending->outlet.sent == sending->fate_at && link_sent(session->link))
		return true;
	*reset = receiving->fate == RESET_RECEIVING;
	return session->received < session->planned && receiving->headed &&
	       (*reset || receiving->fate == CLOSE_RECEIVING) &&
	       receiving->intake.got >= receiving->fate_at;
}

/* All transfers of a connection. Whether the client resets it at the end. */
static bool run_session(struct session *session)
{
	struct link *link = session->link;
	bool reset = false;

	for (;;) {
		while (session->planned < session->total && !stopping &&
		       session->planned - session->received < session->window)
			plan_transfer(session);
		if (session->received == session->planned)
			break;
		if (link_sent(link) && !link->unwritable)
			put_requests(session);
		if (session->sent == session->planned && link_sent(link) && !session->shut &&
		    session->transfers[(session->planned - 1) % WINDOW].fate == HALF_CLOSE) {
			session->shut = true;
			shutdown(link->fd, SHUT_WR);
		}
		if (!take_responses(session))
			return false;
		if (breaks(session, &reset)) {
			ends_early(session, true, "");
			return reset;
		}
		if (session->received == session->planned)
			continue;
		const struct transfer *t = &session->transfers[session->received % WINDOW];

		if (link->asked_wrong)
			return is_wrong(session, t, "FIONREAD said 0 while bytes were there");
		if (link->ended)
			return ends_early(session, false, link->error ? strerror(link->error) : "end");
		if (!link_step(link, true, LIMIT_MS))
			return is_wrong(session, t, "stuck: nothing happens any more");
	}

	const struct transfer *t = &session->transfers[(session->planned + WINDOW - 1) % WINDOW];

	/* The far end closes if it was told to; nothing may come after the last response. */
	while ((t->close || session->shut) && session->planned && !link->ended)
		if (!link_step(link, true, LIMIT_MS))
			return is_wrong(session, t, "stuck: the connection is not closed");
	if (link->in_from != link->in_to)
		is_wrong(session, t, "bytes after the last response");
	return false;
}

static void *work(void *seed)
{
	uint64_t random = mix((intptr_t)seed);

	while (!stopping) {
		struct session session = { .random = &random, .window = 1, .since = now_ns() };
		const struct target *target = &targets[below(&random, target_count)];
		const struct addrinfo *to = target->addresses[below(&random, target->count)];
		struct sockaddr_in6 mapped = { .sin6_family = AF_INET6,
					       .sin6_addr.s6_addr = { [10] = 0xff, 0xff } };
		bool maps = to->ai_family == AF_INET && chance(&random, 33);
		int fd = socket(maps ? AF_INET6 : to->ai_family, SOCK_STREAM, 0);

		session.target = target;
		if (maps) {
			const struct sockaddr_in *v4 = (const void *)to->ai_addr;

			mapped.sin6_port = v4->sin_port;
			memcpy(mapped.sin6_addr.s6_addr + 12, &v4->sin_addr, 4);
		}
		if (maps ? connect(fd, (const struct sockaddr *)&mapped, sizeof(mapped))
			 : connect(fd, to->ai_addr, to->ai_addrlen)) {
			say("LOST %llu %llu %s 0 connect: %s", (unsigned long long)session.since,
			    (unsigned long long)now_ns(), target->name, strerror(errno));
			close(fd);
			usleep(10000);
			continue;
		}
		session.link = link_new(fd, below(&random, SPLICE), draw(&random));
		session.total = some_size(&random, 7);
		if (may(&session, 'p') && chance(&random, 15))
			session.window = 2 + below(&random, WINDOW - 1);
		link_close(session.link, run_session(&session));
	}
	return NULL;
}

static void stop(int signal)
{
	(void)signal;
	stopping = true;
}

static void say_totals(void)
{
	say("transfers %llu %llu %llu %llu %llu %llu", (unsigned long long)complete,
	    (unsigned long long)broken, (unsigned long long)wrong, (unsigned long long)bytes,
	    (unsigned long long)by_redirect, (unsigned long long)by_tcp);
}

static void add_target(char *text)
{
	struct target *target = &targets[target_count++];
	char *host = strtok(text, "/"), *port = strtok(NULL, "/"), *letters = strtok(NULL, "/");
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *found;
	int error = getaddrinfo(host, port, &hints, &found);

	if (error) {
		fprintf(stderr, "%s: %s\n", host, gai_strerror(error));
		exit(1);
	}
	snprintf(target->name, sizeof(target->name), "%s", host);
	snprintf(target->letters, sizeof(target->letters), "%s", letters ? letters : "");
	for (; found && target->count < 8; found = found->ai_next)
		target->addresses[target->count++] = found;
}

static int make_files(const char *directory)
{
	char path[4096];

	for (int i = 0; i < FILES; i++) {
		uint64_t size = (1ull << 2 * i) + i;
		uint8_t *data = malloc(size);

		snprintf(path, sizeof(path), "%s/%d", directory, i);
		stream_copy(FILE_KEY + i, 0, data, size);
		FILE *file = fopen(path, "w");

		if (!file || fwrite(data, size, 1, file) != 1 || fclose(file))
			die("%s", path);
		free(data);
	}
	return 0;
}

int main(int count, char **arguments)
{
	stream_init(STREAM_SEED);
	if (count == 3 && !strcmp(arguments[1], "files"))
		return make_files(arguments[2]);
	if (count < 5)
		return 2;
	number = atoi(arguments[1]);

	uint64_t seed = mix(atoll(arguments[2])) + number;
	int connections = atoi(arguments[3]);
	pthread_t threads[connections];

	for (int i = 4; i < count && target_count < TARGETS; i++)
		add_target(arguments[i]);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGTERM, stop);
	for (int i = 0; i < connections; i++)
		if (pthread_create(&threads[i], NULL, work, (void *)(intptr_t)mix(seed + i * 1000)))
			die("pthread_create");
	while (!stopping) {
		usleep(500000);
		say_totals();
	}
	for (int i = 0; i < connections; i++)
		pthread_join(threads[i], NULL);
	say_totals();
	return 0;
}
