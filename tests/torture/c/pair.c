/* pair NAME: a connection inside a pod over loopback, from 127.0.0.1:15101 to 127.0.0.1:15001 in
 * each pod, where 15001 is also the port of the node's proxy. Messages go there and back, keyed by
 * NAME; they must never meet those of other pods. Says "pair N", the number of messages, each
 * second, and "WRONG ..." if one was.
 */
#include "stream.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>

#define MESSAGE_MAX 16384
#define MESSAGES 500 /* of one connection */

static int bound(int port)
{
	struct sockaddr_in address = { .sin_family = AF_INET,
				       .sin_port = htons(port),
				       .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){ 1 }, sizeof(int));
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){ 1 }, sizeof(int));
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)))
		die("bind to port %d", port);
	return fd;
}

static void *echo(void *listener)
{
	uint8_t data[MESSAGE_MAX];

	for (;;) {
		int fd = accept(*(int *)listener, NULL, NULL);
		ssize_t n;

		if (fd < 0)
			die("accept");
		while ((n = recv(fd, data, sizeof(data), 0)) > 0)
			send(fd, data, n, MSG_NOSIGNAL);
		close(fd);
	}
}

int main(int count, char **arguments)
{
	struct sockaddr_in address = { .sin_family = AF_INET,
				       .sin_port = htons(15001),
				       .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	uint64_t key = 1, random, said = now_ns(), done = 0;
	uint8_t sent[MESSAGE_MAX], got[MESSAGE_MAX];
	int listener = bound(15001);
	pthread_t thread;

	if (count != 2)
		return 2;
	for (const char *name = arguments[1]; *name; name++)
		key = mix(key + *name);
	random = key;
	stream_init(STREAM_SEED);
	if (listen(listener, 8) || pthread_create(&thread, NULL, echo, &listener))
		die("listen");
	for (;;) {
		int fd = bound(15101);

		if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
			die("connect");
		for (int i = 0; i < MESSAGES; i++, done++) {
			size_t size = some_size(&random, 13);
			ssize_t n;

			stream_copy(key, done * MESSAGE_MAX, sent, size);
			if (send(fd, sent, size, MSG_NOSIGNAL) != (ssize_t)size)
				die("send");
			n = recv(fd, got, size, MSG_WAITALL);
			if (n != (ssize_t)size || memcmp(sent, got, size))
				say("WRONG loopback pair of %s: message %llu of %zu bytes, got %zd",
				    arguments[1], (unsigned long long)done, size, n);
			if (now_ns() - said > 1000000000) {
				said = now_ns();
				say("pair %llu", (unsigned long long)done);
			}
			usleep(10000);
		}
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){ 1, 0 },
			   sizeof(struct linger));
		close(fd);
	}
}
