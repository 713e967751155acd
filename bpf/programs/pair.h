/* What workloads' enrolled sockets send: to the paired socket of another workload, or to the proxy.
 *
 * A message is redirected only if it is known to be a whole request, or the begin of one whose length
 * is known, or a response that is due, or a further part of either; everything else goes to the proxy
 * as if there were no pair, and then nothing is redirected until the proxy is done with it and says so.
 * Whether it is follows from numbers: the bytes that the socket has ever sent by TCP are those that the
 * proxy has received, and every request that was forwarded has been answered.
 */
#ifndef WEFT_PAIR_H
#define WEFT_PAIR_H

#include "count.h"
#include "judge.h"
#include "membership.h"
#include "response.h"

#define again(field) (*(volatile typeof(field) *)&(field))
#define tcp_field(tcp, offset, type) (*(type *)((tcp) + (offset)))

/* Its bytes from `data` on, so many of them at least. 0: they are there. (The size is read once, and
 * told: the compiler would make one of several reads, by a pointer that the verifier does not know.) */
static __always_inline int show(struct sk_msg_md *message, u32 size, u32 wanted)
{
	u32 shown = (u32)((long)message->data_end - (long)message->data);

	if (wanted > size)
		wanted = size;
	return shown >= wanted ? 0 : bpf_msg_pull_data(message, 0, wanted, 0);
}

static __always_inline int is_head_request(struct sk_msg_md *message)
{
	const u8 *data = (void *)(long)message->data, *end = (void *)(long)message->data_end;

	return data + 5 <= end && data[0] == 'H' && data[1] == 'E' && data[2] == 'A' &&
	       data[3] == 'D' && data[4] == ' ';
}

/* bcc knows the helper by its own name, and takes one that these programs may not call where it sees
 * no kernel symbols (no CAP_SYSLOG). */
static long (*read_kernel)(void *to, u32 size, const void *from) = (void *)BPF_FUNC_probe_read_kernel;

/* How a message begins. */
static __always_inline void copy_head(struct sk_msg_md *message, struct exchange *exchange)
{
	u64 size = (long)message->data_end - (long)message->data;

	if (size > PASSING_HEAD)
		size = PASSING_HEAD;
	if (read_kernel(exchange->head, size, (void *)(long)message->data))
		size = 0;
	exchange->shown = size;
}

/* A client's socket sends more of a request, which goes where that went; or, with something behind it
 * or after very many messages, to the proxy, as all that follows (`sent` changes). To redirect the one part and pass the other does
 * not work: what bpf_msg_apply_bytes cuts off goes where the first part went, whatever the program says
 * then (msg->sk_redir stays). */
static __always_inline int send_on(struct sk_msg_md *message, u32 size, struct exchange *exchange)
{
	u64 backend = exchange->backend;
	int result;

	if (size > exchange->unsent || exchange->messages >= MESSAGES_MAX)
		return SK_PASS;
	result = workload_sockets.msg_redirect_hash(message, &backend, BPF_F_INGRESS);
	if (result == SK_PASS) {
		exchange->unsent -= size;
		exchange->messages++;
	}
	return SK_PASS;
}

/* The number of a way for a request by this rule, by their shares; PAIR_WAYS: what is left of them. */
static __always_inline u32 choose_way(const struct pair *pair, u32 rule)
{
	u32 chance = bpf_get_prandom_u32() % PAIR_SHARES, at;

#pragma unroll
	for (at = 0; at < PAIR_WAYS; at++) {
		if (!pair->ways[at].rule)
			return PAIR_WAYS;
		if (pair->ways[at].rule != rule)
			continue;
		if (chance < pair->ways[at].share)
			break;
		chance -= pair->ways[at].share;
	}
	return at;
}

/* A client's socket begins a request, or something else: SK_PASS, redirected or not. */
static __always_inline int forward(struct sk_msg_md *message, u32 size, struct exchange *exchange,
				   u64 client, u32 sent)
{
	u64 backend, offer, series, whole;
	struct judged judged;
	u32 response_max, at;
	struct pair *pair;
	int result;

	pair = pairs.lookup(&client);
	if (!pair)
		return SK_PASS;
	offer = again(pair->offer);
	/* A worker that hangs keeps nothing, and wakes with nothing. */
	if (again(pair->client) != client || pair->made_ns < proxies_have() ||
	    exchange->forwarded != exchange->answered + exchange->handed ||
	    exchange->handed != pair->handed || exchange->forwarded == pair->until ||
	    sent != pair->received || bpf_ktime_get_ns() >= pair->expires_ns ||
	    show(message, size, AUTOMATON_HEAD_MAX))
		return SK_PASS;
	judge_head(message, pair->generation, pair->egress, pair->ingress, &judged);
	whole = judged.size + judged.length;
	if (judged.rule == 0 || whole < size || whole > REQUEST_MAX)
		return SK_PASS;
	at = choose_way(pair, judged.rule);
	backend = pair->ways[at & (PAIR_WAYS - 1)].backend;
	series = pair->ways[at & (PAIR_WAYS - 1)].series;
	response_max = pair->ways[at & (PAIR_WAYS - 1)].response_max;
	/* The proxy's next pair may have taken the memory of this one meanwhile. */
	asm volatile("" : : : "memory");
	if (again(pair->offer) != offer || again(pair->offer_again) != offer)
		return SK_PASS;
	if (at >= PAIR_WAYS) {
		exchange->missed++;
		return SK_PASS;
	}
	result = workload_sockets.msg_redirect_hash(message, &backend, BPF_F_INGRESS);
	if (result != SK_PASS)
		return SK_PASS;
	exchange->bodiless = is_head_request(message);
	exchange->started_ns = bpf_ktime_get_ns();
	exchange->backend = backend;
	exchange->series = series;
	exchange->response_max = response_max;
	exchange->egress = judged.egress;
	exchange->ingress = judged.ingress;
	exchange->bytes_in = judged.length;
	exchange->port = message->local_port;
	exchange->sent = sent;
	exchange->messages = 1;
	exchange->left = 0;
	exchange->unsent = whole - size;
	exchange->parted += exchange->unsent != 0;
	copy_head(message, exchange);
	__sync_fetch_and_add(&exchange->forwarded, 1);
	count(REASON_PAIR_REQUEST);
	return SK_PASS;
}

/* What a status is counted under: a backend must not fill the map with numbers that it invents. */
static __always_inline u32 counted_status(u32 status)
{
	u32 of = status / 100, rest = status % 100;
	u64 registered = of == 2   ? STATUSES_2XX
			 : of == 3 ? STATUSES_3XX
			 : of == 4 ? STATUSES_4XX
				   : STATUSES_5XX;

	return rest < 64 && registered >> (rest & 63) & 1 ? status : of * 100 + 99;
}

/* A request was answered past the proxy. */
static __always_inline void measure(const struct exchange *exchange, u64 elapsed)
{
	struct passed_key key = {
		.series = exchange->series,
		.egress = exchange->egress,
		.ingress = exchange->ingress,
		.status = counted_status(exchange->status),
	};
	struct passed *counted, none = {};
	u32 bucket = 0;

	counted = passed.lookup_or_try_init(&key, &none);
	if (!counted) {
		count(REASON_PAIR_UNCOUNTED);
		return;
	}
	/* As in `count`: per CPU, and atomic. */
	__sync_fetch_and_add(&counted->requests, 1);
	__sync_fetch_and_add(&counted->bytes_in, exchange->bytes_in);
	__sync_fetch_and_add(&counted->bytes_out, exchange->bytes_out);
	__sync_fetch_and_add(&counted->elapsed_ns, elapsed);
#define SLOWER(bound) bucket += elapsed > (bound);
	PAIR_BOUNDS(SLOWER)
#undef SLOWER
	if (bucket < PAIR_BUCKETS)
		__sync_fetch_and_add(&counted->faster[bucket], 1);
}

/* Whoever takes these out looks now and then: nobody is woken. */
static __always_inline void tell(const struct exchange *exchange, u64 elapsed)
{
	struct passing *passing = passings.ringbuf_reserve(sizeof(*passing));

	if (!passing) {
		count(REASON_PAIR_UNTOLD);
		return;
	}
	passing->started_ns = exchange->started_ns;
	passing->elapsed_ns = elapsed;
	passing->series = exchange->series;
	passing->egress = exchange->egress;
	passing->ingress = exchange->ingress;
	passing->status = exchange->status;
	passing->bytes_in = exchange->bytes_in;
	passing->bytes_out = exchange->bytes_out;
	passing->port = exchange->port;
	passing->shown = exchange->shown;
	passing->zero = 0;
	__builtin_memcpy(passing->head, exchange->head, PASSING_HEAD);
	passings.ringbuf_submit(passing, BPF_RB_NO_WAKEUP);
}

/* How many bytes of a response will be left after this message; negative: it is the proxy's. */
static __always_inline s64 left_after(struct sk_msg_md *message, u32 size,
				      struct exchange *exchange, u32 unread)
{
	struct response response = {.state = RESPONSE_START};

	if (exchange->left)
		return (s64)exchange->left - size;
	if (unread || exchange->unsent || size > exchange->response_max ||
	    show(message, size, RESPONSE_HEAD_MAX) || read_response(message, &response))
		return -1;
	if (exchange->bodiless)
		response.length = 0;
	exchange->messages = 0;
	exchange->status = response.status;
	exchange->bytes_out = response.length;
	response.length += response.size;
	return response.length <= exchange->response_max ? (s64)response.length - size : -1;
}

/* A backend's socket sends: SK_PASS or SK_DROP. */
static __always_inline int give_back(struct sk_msg_md *message, u32 size,
				     const struct workload *own, u32 sent, u32 unread)
{
	u64 backend = own->cookie, client, elapsed;
	struct exchange *exchange;
	struct paired *paired_with;
	int result = SK_DROP;
	s64 left = -1;

	paired_with = paired.lookup(&backend);
	if (!paired_with)
		return SK_PASS;
	client = paired_with->client;
	exchange = exchanges.lookup(&client);
	if (!exchange || exchange->forwarded == exchange->answered + exchange->handed)
		return SK_PASS;
	/* Whom it went to is known before it counts as forwarded; only that one may answer. */
	asm volatile("" : : : "memory");
	if (again(exchange->backend) != backend)
		return SK_PASS;
	if (sent == paired_with->received && again(paired_with->client) == client)
		left = left_after(message, size, exchange, unread);
	if (left >= 0 && exchange->messages < MESSAGES_MAX)
		result = workload_sockets.msg_redirect_hash(message, &client, BPF_F_INGRESS);
	elapsed = bpf_ktime_get_ns() - exchange->started_ns;
	if (result != SK_PASS) {
		if (exchange->left && left < 0) {
			count(REASON_PAIR_BROKEN);
			return SK_DROP;
		}
		/* Of a response that has begun `left` is what the proxy gives the client, and no more. */
		__sync_fetch_and_add(&exchange->handed, 1);
		count(REASON_PAIR_HANDED);
		return SK_PASS;
	}
	exchange->left = left;
	exchange->messages++;
	if (!left) {
		measure(exchange, elapsed);
		tell(exchange, elapsed);
		paired_with = paired.lookup(&backend);
		if (paired_with)
			paired_with->answered++;
		__sync_fetch_and_add(&exchange->answered, 1);
		count(REASON_PAIR_RESPONSE);
	}
	return SK_PASS;
}

static __always_inline int exchange_message(struct sk_msg_md *message)
{
	struct bpf_sock *sk = message->sk;
	struct exchange *exchange;
	struct workload *own;
	u32 size = message->size, sent, unread;
	u64 client;
	void *tcp;

	own = sk ? workload.sk_storage_get(sk, 0, 0) : 0;
	tcp = own ? bpf_skc_to_tcp_sock(sk) : 0;
	/* A worker that is gone withdraws nothing; but its sockets have closed. */
	if (!tcp || sk->state != BPF_TCP_ESTABLISHED)
		return SK_PASS;
	/* Whoever has not read what it was sent is sent no more: memory stays bounded. */
	unread = tcp_field(tcp, SK_RMEM_ALLOC, int);
	sent = tcp_field(tcp, TCP_WRITE_SEQ, u32) - own->base;
	if (own->is_backend)
		return give_back(message, size, own, sent, unread);
	client = own->cookie;
	exchange = exchanges.lookup(&client);
	if (exchange && exchange->unsent && exchange->sent == sent)
		return send_on(message, size, exchange);
	return exchange && !unread ? forward(message, size, exchange, client, sent) : SK_PASS;
}

#endif
