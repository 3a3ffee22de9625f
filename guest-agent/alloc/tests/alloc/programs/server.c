/* A process that serves its own file system: a thread asks about a file, and what answers allocates. The file system is
 * played: the kernel asks this process before it carries out a system call on the file. The argument is the file. */
#define _GNU_SOURCE
#include "pages.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

static int file;
static atomic_int listener = -1, done;

/* Asks for each look at the file, of this thread. */
static int filter(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, file, 0, 6),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fstat, 3, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_newfstatat, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_statx, 1, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fstatfs, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof code / sizeof *code, code};
	CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
}

static void *maps(void *unused)
{
	int fixed = MAP_SHARED | MAP_FIXED;
	char *private, *shared;
	listener = filter();
	CHECK(listener >= 0);
	private = mmap(NULL, 3 * PAGE, RW, MAP_PRIVATE, file, 0);
	shared = mmap(NULL, 3 * PAGE, RW, MAP_SHARED, file, 0);
	CHECK(private != MAP_FAILED && shared != MAP_FAILED && *word(private, 2) == 102 && *word(shared, 2) == 102);
	CHECK(mmap(private, 3 * PAGE, RW, fixed, file, 0) == private && *word(private, 2) == 102);
	done = 1;
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t thread;
	int asked = 0;
	file = open(argv[1], O_RDWR | O_CREAT | O_EXCL, 0600);
	CHECK(file >= 0 && ftruncate(file, 3 * PAGE) == 0);
	for (uint64_t n = 0, value = 100; n < 3; n++, value++)
		CHECK(pwrite(file, &value, 8, n * PAGE) == 8);
	alarm(600);
	CHECK(pthread_create(&thread, NULL, maps, NULL) == 0);
	while (!done) {
		struct pollfd poll_for = {.fd = listener, .events = POLLIN};
		struct seccomp_notif call = {0};
		if (poll(&poll_for, 1, 10) <= 0 || !(poll_for.revents & POLLIN))
			continue;
		CHECK(ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &call) == 0);
		/* The compiler must not leave it out. */
		void *volatile blocks[] = {malloc(100), malloc(3 << 20)};
		free(blocks[0]);
		free(blocks[1]);
		asked++;
		struct seccomp_notif_resp answer = {.id = call.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
		CHECK(ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer) == 0);
	}
	CHECK(pthread_join(thread, NULL) == 0 && asked > 0);
	tell("through", 0);
	await();
	return 0;
}
