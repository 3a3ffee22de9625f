/* Listens where an agent should, as another user, and never answers. Arguments: the socket, the user's number. */
#define _GNU_SOURCE
#include "told.h"
#include <sys/socket.h>
#include <sys/un.h>

int main(int argc, char **argv)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	uid_t user = atoi(argv[2]);
	int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	CHECK(fd >= 0 && setresuid(user, user, user) == 0);
	strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
	CHECK(bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, 8) == 0);
	tell("listens", 0);
	await();
	return 0;
}
