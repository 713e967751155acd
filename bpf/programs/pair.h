/* What workloads' enrolled sockets send: to the paired socket of another workload, or to the proxy.
 *
 * A message is redirected only if all of it is known to be one whole request, or a response that is
 * due, or a further part of it; everything else goes to the proxy as if there were no pair, and then nothing is
 * redirected until the proxy is done with it and says so. Whether it is follows from numbers: the
 * bytes that the socket has ever sent by TCP are those that the proxy has received, and every request
 * that was forwarded has been answered.
 */
#ifndef WEFT_PAIR_H
#define WEFT_PAIR_H

#include "count.h"
#include "judge.h"
#include "membership.h"
#include "response.h"

#define again(field) (*(volatile typeof(field) *)&(field))
#define tcp_field(tcp, offset, type) (*(type *)((tcp) + (offset)))

/* Its bytes from `data` on, as many of them as its head may have. 0: they are there. */
static __always_inline int show(struct sk_msg_md *message)
{
	u32 shown = (u32)((long)message->data_end - (long)message->data);

	if (shown >= message->size || shown >= AUTOMATON_HEAD_MAX)
		return 0;
	return bpf_msg_pull_data(message, 0, message->size, 0);
}

static __always_inline int is_head_request(struct sk_msg_md *message)
{
	const u8 *data = (void *)(long)message->data, *end = (void *)(long)message->data_end;

	return data + 5 <= end && data[0] == 'H' && data[1] == 'E' && data[2] == 'A' &&
	       data[3] == 'D' && data[4] == ' ';
}

/* A client's socket sends; whether it is redirected. */
static __always_inline int forward(struct sk_msg_md *message, const struct workload *own, u32 sent)
{
	u64 client = own->cookie, backend, offer;
	u32 rule;
	struct exchange *exchange;
	struct judged judged;
	struct pair *pair;
	int result;

	pair = pairs.lookup(&client);
	exchange = pair ? exchanges.lookup(&client) : 0;
	if (!exchange)
		return 0;
	offer = pair->offer;
	backend = pair->backend;
	/* Offers and what is in force are told by their time: a worker that hangs keeps nothing. */
	if (offer < in_force() || exchange->forwarded != exchange->answered + exchange->handed ||
	    exchange->handed != pair->handed || exchange->forwarded == pair->until ||
	    sent != pair->received || bpf_ktime_get_ns() >= pair->expires_ns || message->size > REQUEST_MAX || show(message))
		return 0;
	rule = pair->rule;
	judge_head(message, pair->generation, pair->egress, pair->ingress, &judged);
	if (judged.rule == 0 || judged.rule != rule || judged.size + judged.length != message->size)
		return 0;
	/* The proxy's next pair may have taken the memory of this one meanwhile. */
	asm volatile("" : : : "memory");
	if (again(pair->offer) != offer || again(pair->offer_again) != offer)
		return 0;
	result = workload_sockets.msg_redirect_hash(message, &backend, BPF_F_INGRESS);
	if (result != SK_PASS)
		return 0;
	exchange->bodiless = is_head_request(message);
	exchange->started_ns = bpf_ktime_get_ns();
	exchange->bytes_in += message->size;
	__sync_fetch_and_add(&exchange->forwarded, 1);
	count(REASON_PAIR_REQUEST);
	return 1;
}

static __always_inline void measure(struct exchange *exchange, u64 elapsed)
{
	u32 bucket = 0;

	exchange->elapsed_ns += elapsed;
#define SLOWER(bound) bucket += elapsed > (bound);
	PAIR_BOUNDS(SLOWER)
#undef SLOWER
	if (bucket < PAIR_BUCKETS)
		exchange->faster[bucket]++;
}

/* How many bytes of a response will be left after this message; negative: it is the proxy's. */
static __always_inline s64 left_after(struct sk_msg_md *message, const struct exchange *exchange,
				      u32 unread)
{
	if (exchange->left)
		return (s64)exchange->left - message->size;
	if (unread || message->size > RESPONSE_MAX || show(message))
		return -1;
	return response_left(message, exchange->bodiless);
}

/* A backend's socket sends: SK_PASS or SK_DROP. */
static __always_inline int give_back(struct sk_msg_md *message, const struct workload *own,
				     u32 sent, u32 unread)
{
	u64 backend = own->cookie, client;
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
	if (sent == paired_with->received && again(paired_with->client) == client)
		left = left_after(message, exchange, unread);
	if (left >= 0)
		result = workload_sockets.msg_redirect_hash(message, &client, BPF_F_INGRESS);
	if (result != SK_PASS) {
		/* Nobody could put in order what comes after the first part of a response. */
		if (exchange->left) {
			count(REASON_PAIR_BROKEN);
			return SK_DROP;
		}
		__sync_fetch_and_add(&exchange->handed, 1);
		count(REASON_PAIR_HANDED);
		return SK_PASS;
	}
	exchange->left = left;
	exchange->bytes_out += message->size;
	if (!left) {
		measure(exchange, bpf_ktime_get_ns() - exchange->started_ns);
		__sync_fetch_and_add(&exchange->answered, 1);
		count(REASON_PAIR_RESPONSE);
	}
	return SK_PASS;
}

static __always_inline int exchange_message(struct sk_msg_md *message)
{
	struct bpf_sock *sk = message->sk;
	struct workload *own;
	u32 sent, unread;
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
		return give_back(message, own, sent, unread);
	if (!unread)
		forward(message, own, sent);
	return SK_PASS;
}

#endif
