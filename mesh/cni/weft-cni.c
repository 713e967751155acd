/* The CNI plugin on the host, which has nothing of ours: hands what it was given to the agent and
 * says what that answers. Sent: the CNI_* variables, each with a NUL behind it, one NUL more, then
 * the standard input; and, if there is one, a netlink socket of the pod's network namespace, so that
 * the agent needs neither its path nor the right to enter it. Answered: "0" or "1", the exit status,
 * then the standard output. Without an agent nothing of a pod can be set up: try again later. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define SOCKET "/run/weft/cni.sock"
#define WAIT_S 60

extern char **environ;
static char input[1 << 20], answer[1 << 20];

/* Where the agent answers: "weftSocket" of the configuration. */
static void find_agent(struct sockaddr_un *to)
{
	const char *at = strstr(input, "\"weftSocket\"");

	if (!at || sscanf(at + 12, " : \"%107[^\"]\"", to->sun_path) != 1)
		strcpy(to->sun_path, SOCKET);
}

/* What "cniVersion" the configuration has; what is none is 1.1.0. */
static const char *version(void)
{
	static char found[16];
	const char *at = strstr(input, "\"cniVersion\"");

	if (!at || sscanf(at + 12, " : \"%15[0-9.]\"", found) != 1)
		return "1.1.0";
	return found;
}

static int alone(const char *command, const char *why)
{
	int status = !strcmp(command, "STATUS") ? 50 : 11;

	/* What there was of the pod goes when the agent starts. */
	if (!strcmp(command, "DEL"))
		return 0;
	if (!strcmp(command, "VERSION")) {
		printf("{\"cniVersion\":\"%s\",\"supportedVersions\":[\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]}",
		       version());
		return 0;
	}
	printf("{\"cniVersion\":\"%s\",\"code\":%d,\"msg\":\"Weft's agent does not answer on this node\","
	       "\"details\":\"%s; kubectl -n weft-system get pods -o wide\"}",
	       version(), status, why);
	return 1;
}

/* A netlink socket in the pod's namespace; -1: it has none, or is no network namespace. */
static int inside(const char *path)
{
	int fd = path && *path ? open(path, O_RDONLY | O_CLOEXEC) : -1;

	if (fd < 0 || setns(fd, CLONE_NEWNET))
		return -1;
	return socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 0);
}

static int say(int to, const char *data, size_t size)
{
	while (size) {
		ssize_t sent = send(to, data, size, MSG_NOSIGNAL);

		if (sent <= 0)
			return -1;
		data += sent;
		size -= sent;
	}
	return 0;
}

static int begin(int to, int pod)
{
	char room[CMSG_SPACE(sizeof(int))] = {0}, mark = 'W';
	struct iovec one = {&mark, 1};
	struct msghdr message = {.msg_iov = &one, .msg_iovlen = 1};

	if (pod >= 0) {
		struct cmsghdr *head;

		message.msg_control = room;
		message.msg_controllen = sizeof(room);
		head = CMSG_FIRSTHDR(&message);
		head->cmsg_level = SOL_SOCKET;
		head->cmsg_type = SCM_RIGHTS;
		head->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(head), &pod, sizeof(int));
	}
	return sendmsg(to, &message, MSG_NOSIGNAL) == 1 ? 0 : -1;
}

int main(void)
{
	const char *command = getenv("CNI_COMMAND");
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	struct timeval wait = {.tv_sec = WAIT_S};
	size_t size = 0, got = 0;
	ssize_t more;
	int fd;

	while (size < sizeof(input) - 1 &&
	       (more = read(0, input + size, sizeof(input) - 1 - size)) > 0)
		size += more;
	command = command ? command : "";
	find_agent(&to);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof(to)))
		return alone(command, "it cannot be reached");
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait));
	if (begin(fd, inside(getenv("CNI_NETNS"))))
		return alone(command, "it went away");
	for (char **one = environ; *one; one++)
		if (!strncmp(*one, "CNI_", 4) && say(fd, *one, strlen(*one) + 1))
			return alone(command, "it went away");
	if (say(fd, "", 1) || say(fd, input, size) || shutdown(fd, SHUT_WR))
		return alone(command, "it went away");
	while (got < sizeof(answer) && (more = recv(fd, answer + got, sizeof(answer) - got, 0)) > 0)
		got += more;
	if (!got || more < 0)
		return alone(command, "it does not answer");
	fwrite(answer + 1, 1, got - 1, stdout);
	return answer[0] != '0';
}
