/* Another process, or a forked child, asks for the context of a process: there is no such one for it. */
#include "told.h"
#include <errno.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

struct hello {
	uint32_t kind, seqno;
	int32_t status;
	uint32_t reserved, version, join;
};

static int join(const char *path, uint32_t ctx_id)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct hello hello = {.kind = 1, .version = 1, .join = ctx_id};
	int status[10];
	int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	strncpy(address.sun_path, path, sizeof address.sun_path - 1);
	CHECK(connect(fd, (struct sockaddr *)&address, sizeof address) == 0);
	CHECK(send(fd, &hello, sizeof hello, 0) == sizeof hello);
	CHECK(recv(fd, status, sizeof status, 0) >= 16);
	close(fd);
	return status[2];
}

int main(int argc, char **argv)
{
	uint32_t theirs = strtoul(argv[2], NULL, 10);
	struct {
		uint32_t ctx_id;
		char socket[108];
	} session;
	int svm_alloc_session(void *) __attribute__((weak));
	int status;
	CHECK(svm_alloc_session && svm_alloc_session(&session) == 0);
	CHECK(!strcmp(session.socket, argv[1]) && session.ctx_id != theirs);
	CHECK(join(argv[1], theirs) == -ENOENT);
	CHECK(join(argv[1], session.ctx_id) == 0);
	if (fork() == 0) {
		uint32_t of_parent = session.ctx_id;
		CHECK(join(argv[1], of_parent) == -ENOENT);
		CHECK(svm_alloc_session(&session) == 0 && session.ctx_id != of_parent);
		CHECK(join(argv[1], session.ctx_id) == 0);
		_exit(0);
	}
	CHECK(wait(&status) > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0);
	tell("end", 0);
	return 0;
}
