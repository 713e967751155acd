/* backend [-a] [-s] [-d] PORT: answers as each request asks for (struct plan), a thread for each
 * connection. -a asks FIONREAD before it reads, -s uses splice(2), -d sets TCP_DEFER_ACCEPT.
 *
 * Says "paths R T" when they changed: connections by redirect and by TCP; and "WRONG ..." when
 * bytes are not as they should be.
 */
#include "link.h"
#include "message.h"
#include <pthread.h>
#include <signal.h>

#define LINGER_MS 5000

static enum habit habit = READ;

/* "HTTP/1.1 200 OK" and so on, into the link; the body follows. */
static void put_head(struct link *link, const struct plan *plan, bool last)
{
	char framing[64] = "transfer-encoding: chunked";

	if (!plan->chunked)
		sprintf(framing, "content-length: %llu", plan->response);
	link->out_to = sprintf((char *)link->out, "HTTP/1.1 200 OK\r\nx-id: %llu\r\n%s\r\n%s\r\n",
			       plan->id, framing, last ? "connection: close\r\n" : "");
}

static bool get_plan(const struct head *head, struct plan *plan)
{
	const char *field = head_field(head, "\nx-plan:");
	unsigned long long id;

	return field &&
	       sscanf(field, PLAN_FORMAT, &plan->id, &plan->request, &plan->response, &plan->chunked,
		      &plan->at_once, &plan->end, &plan->end_at, &plan->pause_at, &plan->pause_ms,
		      &plan->piece_max) == 10 &&
	       sscanf(head->text, "POST /t/%llu ", &id) == 1 && id == plan->id &&
	       plan->piece_max <= ROOM / 2;
}

/* The whole answer is sent, the request is not read: RFC 9112 section 9.6. */
static void linger(struct link *link)
{
	shutdown(link->fd, SHUT_WR);
	do
		link->in_from = link->in_to = 0;
	while (!link->ended && link_step(link, true, LINGER_MS));
}

/* One request and its answer. False: it was the connection's last. */
static bool serve_one(struct link *link, bool *reset)
{
	struct head head;
	struct plan plan;
	size_t used;

	while (!head_take(&head, link->in + link->in_from, link->in_to - link->in_from, &used)) {
		if (link->ended || link->in_to - link->in_from > HEAD_MAX)
			return false;
		link_step(link, true, -1);
	}
	link->in_from += used;
	if (!get_plan(&head, &plan)) {
		say("WRONG request: %.200s", head.text);
		return false;
	}

	struct intake intake = { .key = 2 * plan.id, .size = plan.request };
	struct outlet outlet = { .key = 2 * plan.id + 1,
				 .size = plan.response,
				 .chunked = plan.chunked,
				 .piece_max = plan.piece_max };
	bool cut = plan.end == EARLY || plan.end == ABRUPT, answering = false;
	bool headed = false, last = cut || field_is(head_field(&head, "\nconnection:"), "close");

	intake_begin(&intake, &head, true);
	link->write_max = plan.piece_max;
	for (;;) {
		bool reading = !intake.done && !(cut && answering);

		if (reading) {
			link->in_from += intake_take(&intake, link->in + link->in_from,
						     link->in_to - link->in_from);
			reading = !intake.done;
		}
		if (link->asked_wrong || *intake.wrong) {
			say("WRONG request %llu: %s", plan.id,
			    link->asked_wrong ? "FIONREAD said 0 while bytes were there"
					      : intake.wrong);
			return false;
		}
		if (plan.pause_ms && intake.got >= plan.pause_at) {
			link->resume_ns = now_ns() + plan.pause_ms * 1000000ull;
			plan.pause_ms = 0;
		}
		if (plan.end == RESET && answering && outlet.sent >= plan.end_at && link_sent(link)) {
			*reset = true;
			return false;
		}
		if (outlet.ended && link_sent(link) && (intake.done || cut))
			break;
		if (link->unwritable || (reading && link->ended))
			return false;
		answering |= intake.done || plan.at_once || (cut && intake.got >= plan.end_at);
		if (answering && link_sent(link)) {
			bool whole = intake.done || cut;
			/* Never the whole of what it breaks: the connection might be used again. */
			uint64_t until = plan.end == RESET ? plan.end_at : outlet.size - !whole;

			link->out_from = link->out_to = 0;
			if (!headed)
				put_head(link, &plan, last);
			headed = true;
			link->out_to += outlet_next(&outlet, link->out + link->out_to, until,
						    &link->random);
		}
		link_step(link, reading && !(cut && answering), -1);
	}
	if (plan.end == EARLY)
		linger(link);
	return !last;
}

static void *serve(void *connection)
{
	int fd = (intptr_t)connection;
	struct link *link = link_new(fd, habit, now_ns() + fd);
	bool reset = false;

	while (serve_one(link, &reset))
		;
	link_close(link, reset);
	return NULL;
}

int main(int count, char **arguments)
{
	struct sockaddr_in6 address = { .sin6_family = AF_INET6 };
	int fd = socket(AF_INET6, SOCK_STREAM, 0), option;
	uint64_t said = 0;
	pthread_attr_t detached;

	signal(SIGPIPE, SIG_IGN);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){ 1 }, sizeof(int));
	while ((option = getopt(count, arguments, "asd")) > 0) {
		if (option == '?')
			return 2;
		if (option == 'd')
			setsockopt(fd, IPPROTO_TCP, TCP_DEFER_ACCEPT, &(int){ 5 }, sizeof(int));
		else
			habit = option == 'a' ? ASK : SPLICE;
	}
	stream_init(STREAM_SEED);
	address.sin6_port = htons(atoi(arguments[optind]));
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 1024))
		die("port %s", arguments[optind]);
	pthread_attr_init(&detached);
	pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
	for (;;) {
		struct pollfd listening = { .fd = fd, .events = POLLIN };

		if (poll(&listening, 1, 1000) > 0) {
			int connection = accept(fd, NULL, NULL);
			pthread_t thread;

			if (connection < 0 || pthread_create(&thread, &detached, serve,
							     (void *)(intptr_t)connection))
				die("accept");
		}
		if (said != by_redirect + by_tcp) {
			said = by_redirect + by_tcp;
			say("paths %llu %llu", (unsigned long long)by_redirect,
			    (unsigned long long)by_tcp);
		}
	}
}
