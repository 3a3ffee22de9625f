/* Mappings of each kind that is the program's own. The first argument is a directory for files. */
#define _GNU_SOURCE
#include "pages.h"
#include "svm_alloc.h"
#include <dlfcn.h>

static int file_of(const char *directory, const char *name, size_t pages)
{
	char path[4096];
	uint64_t page[WORDS] = {0};
	int fd;
	snprintf(path, sizeof path, "%s/%s", directory, name);
	fd = open(path, O_RDWR | O_CREAT, 0600);
	CHECK(fd >= 0);
	for (size_t n = 0; n < pages; n++) {
		page[0] = 300 + n;
		CHECK(write(fd, page, PAGE) == PAGE);
	}
	return fd;
}

static void *mapped(size_t pages, int prot, int flags, int fd, off_t offset)
{
	void *base = mmap(NULL, pages * PAGE, prot, flags, fd, offset);
	CHECK(base != MAP_FAILED);
	return base;
}

static void tell_left(const char *name)
{
	void (*ask)(struct svm_alloc_left *) = dlsym(RTLD_DEFAULT, "svm_alloc_left");
	struct svm_alloc_left left;
	ask(&left);
	tell(name, left.mappings);
}

int main(int argc, char **argv)
{
	int private = MAP_PRIVATE | MAP_ANONYMOUS;
	int zero = open("/dev/zero", O_RDWR), file = file_of(argv[1], "file", 5);
	uint64_t in_file;
	void *bases[3];
	CHECK(argc == 2 && zero >= 0);

	bases[0] = mapped(5, RW, private, -1, 0);
	bases[1] = mapped(5, RW, MAP_PRIVATE, zero, 0);
	bases[2] = mmap64(NULL, 5 * PAGE - 100, RW, private | MAP_NORESERVE, -1, 0);
	CHECK(bases[2] != MAP_FAILED);
	for (int n = 0; n < 3; n++) {
		CHECK(is_zero(bases[n], 0, 5));
		set_words(bases[n], 0, 5, 100 * n);
		tell_address("reached", bases[n]);
	}
	await();
	/* The test has added a million to each. */
	for (int n = 0; n < 3; n++) {
		CHECK(words_are(bases[n], 0, 5, 1000000 + 100 * n));
		CHECK(munmap(bases[n], 5 * PAGE) == 0);
	}
	tell("unmapped", 0);
	await();

	/* One page of the file before, one behind its end. */
	bases[0] = mapped(5, RW, MAP_PRIVATE, file, PAGE);
	CHECK(words_are(bases[0], 0, 4, 301));
	tell_address("file", bases[0]);
	await();
	CHECK(words_are(bases[0], 0, 4, 1000301));
	CHECK(pread(file, &in_file, 8, PAGE) == 8 && in_file == 301);
	CHECK(madvise(bases[0], 4 * PAGE, MADV_DONTNEED) == 0 && words_are(bases[0], 0, 4, 1000301));
	errno = 0;
	CHECK(mremap(bases[0], 4 * PAGE, 6 * PAGE, MREMAP_MAYMOVE) == MAP_FAILED && errno == ENOMEM);
	CHECK(munmap(bases[0], 5 * PAGE) == 0);

	tell_left("none");
	tell_address("left", mapped(5, PROT_NONE, private, -1, 0));
	tell_address("left", mapped(5, PROT_READ, private, -1, 0));
	tell_address("left", mapped(5, PROT_READ | PROT_WRITE | PROT_EXEC, private, -1, 0));
	tell_address("left", mapped(5, RW, private | MAP_STACK, -1, 0));
	tell_address("left", mapped(5, PROT_READ, MAP_PRIVATE, file, 0));
	tell_left("none");
	tell_address("left", mapped(20000, RW, private | MAP_NORESERVE, -1, 0));
	tell_address("left", mapped(200000, RW, private, -1, 0));
	tell_address("left", mapped(5, RW, MAP_SHARED, file, 0));
	tell_left("three");
	await();

	/* What the kernel refuses is refused. */
	errno = 0;
	CHECK(mmap(NULL, 0, RW, private, -1, 0) == MAP_FAILED && errno == EINVAL);
	errno = 0;
	CHECK(mmap(NULL, PAGE, RW, MAP_PRIVATE, 12345, 0) == MAP_FAILED && errno == EBADF);
	errno = 0;
	CHECK(munmap((void *)1, PAGE) == -1 && errno == EINVAL);
	CHECK(munmap(bases[0], 5 * PAGE) == 0);
	errno = 0;
	CHECK(mprotect(bases[0], 5 * PAGE, PROT_READ) == -1 && errno == ENOMEM);
	CHECK(madvise(bases[0], 5 * PAGE, MADV_DONTNEED) == -1 && errno == ENOMEM);
	CHECK(mremap(bases[0], PAGE, 2 * PAGE, MREMAP_MAYMOVE) == MAP_FAILED && errno == EFAULT);
	return 0;
}
