/* Every function that makes a stream. */
#define _GNU_SOURCE
#include "told.h"
#include <wchar.h>

static ssize_t sink(void *cookie, const char *bytes, size_t len)
{
	*(size_t *)cookie += len;
	return len;
}

/* Tells where it is, and sees that it works. */
static FILE *made(FILE *stream)
{
	CHECK(stream);
	tell_address("stream", stream);
	return stream;
}

static void check_text(FILE *stream)
{
	char text[20] = "";
	CHECK(fputs("some text", stream) >= 0 && fflush(stream) == 0);
	rewind(stream);
	CHECK(fgets(text, sizeof text, stream) && !strcmp(text, "some text"));
	CHECK(fclose(stream) == 0);
}

int main(void)
{
	char text[20] = "", *buffer[2];
	size_t len, wrote = 0;
	wchar_t *wide;
	FILE *stream = made(fopen("/dev/null", "r+"));
	CHECK(fgetc(stream) == EOF && freopen("/dev/zero", "r", stream) && fgetc(stream) == 0);
	CHECK(fclose(stream) == 0);
	check_text(made(tmpfile()));
	stream = made(fdopen(dup(1), "w"));
	CHECK(fclose(stream) == 0);
	stream = made(popen("echo from a shell", "r"));
	CHECK(fgets(text, sizeof text, stream) && !strcmp(text, "from a shell\n") && pclose(stream) == 0);
	check_text(made(fmemopen(NULL, 100, "w+")));
	stream = made(fopencookie(&wrote, "w", (cookie_io_functions_t){.write = sink}));
	CHECK(fputs("some text", stream) >= 0 && fclose(stream) == 0 && wrote == 9);
	/* One buffer as it was made, one that has grown. */
	stream = made(open_memstream(&buffer[0], &len));
	CHECK(fputs("eight bytes and more", stream) >= 0 && fflush(stream) == 0 && len == 20);
	tell_address("small", buffer[0]);
	FILE *other = open_memstream(&buffer[1], &len);
	fputs("longer line", other);
	for (int n = 0; n < 20000; n++)
		CHECK(fputs("0123456789", other) >= 0);
	CHECK(fclose(other) == 0 && len == 200011);
	tell_address("grown", buffer[1]);
	other = made(open_wmemstream(&wide, &len));
	CHECK(fputws(L"wide", other) >= 0 && fflush(other) == 0 && len == 4);
	tell_address("wide", wide);
	await();
	CHECK(fclose(stream) == 0 && fclose(other) == 0 && !wcscmp(wide, L"wide"));
	/* What was a stream's can be one's again. */
	for (int n = 0; n < 100000; n++)
		CHECK(fclose(fopen("/dev/null", "w")) == 0);
	free(buffer[0]);
	free(buffer[1]);
	free(wide);
	return 0;
}
