/* Processes that live: they map, unmap, remap, protect, fork, execute and die at random, while devices read and write the
 * same memory by plain pointers. Each knows what every word of its memory must be, and looks, by itself and by a device;
 * and it knows what no device may reach, and has one try. A stale byte is one that is something else.
 *
 *   life run LEVEL SECONDS PROCESSES SEED   keeps so many processes alive, kills some, prints what they did as a line of
 *                                           JSON. Goes on for a while if something was never done.
 *   life once LEVEL SEED                    one of them; prints the seed if it finds something wrong
 *
 * LEVEL is what the agent does with this user's processes: strict or trusted.
 *
 * Nothing that is done here may fail, but what is said to.
 */
#define _GNU_SOURCE
#include "../../guest-agent/alloc/tests/alloc/programs/raw.h"
#include "gpu.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, PAGE_WORDS = PAGE / 8, HUGE_PAGE = 2 << 20 };
enum { PIECES = 20, MAX_PAGES = 32, LARGE_BLOCK = 1 << 20, STEPS = 60, STACK_WORDS = 1024 };
enum { MAX_PROCESSES = 64, PATIENCE_MS = 60000, MAX_AGE_MS = 8000 };
enum { BOTH = PROT_READ | PROT_WRITE, ANONYMOUS = MAP_PRIVATE | MAP_ANONYMOUS };

/* What was done, by all processes together. */

#define DEEDS(deed)                                                                                                    \
	deed(MMAP, "mmap")                                                                                             \
	deed(MMAP_SHARED, "mmap, shared")                                                                              \
	deed(MALLOC, "malloc")                                                                                         \
	deed(MALLOC_LARGE, "malloc, large")                                                                            \
	deed(FREE, "free")                                                                                             \
	deed(MUNMAP, "munmap")                                                                                         \
	deed(HOLE, "munmap, a hole")                                                                                   \
	deed(BY_NUMBER, "by number")                                                                                   \
	deed(OVER, "mmap over")                                                                                        \
	deed(MREMAP, "mremap")                                                                                         \
	deed(MOVE, "mremap to a place")                                                                                \
	deed(REALLOC, "realloc")                                                                                       \
	deed(DONTNEED, "MADV_DONTNEED")                                                                                \
	deed(LAZILY, "MADV_FREE")                                                                                      \
	deed(REMOVE, "MADV_REMOVE")                                                                                    \
	deed(PROTECT, "mprotect")                                                                                      \
	deed(BACK, "mprotect back")                                                                                    \
	deed(SBRK_UP, "sbrk up")                                                                                       \
	deed(SBRK_DOWN, "sbrk down")                                                                                   \
	deed(FORK, "fork")                                                                                             \
	deed(EXEC, "exec")                                                                                             \
	deed(KILL, "kill")                                                                                             \
	deed(GONE_IN_USE, "gone in use")                                                                               \
	deed(REFUSED, "refused")                                                                                       \
	deed(LOOKED_AT, "bytes looked at by devices")                                                                  \
	deed(FILLED, "bytes filled by devices")                                                                        \
	deed(HUGE_MMAP, "huge page")                                                                                   \
	deed(HUGE_MUNMAP, "huge page gone")

#define DEED(name, text) DEED_##name,
enum deed { DEEDS(DEED) NUM_DEEDS };
#define DEED_TEXT(name, text) text,
static const char *const deeds[] = { DEEDS(DEED_TEXT) };

struct tally {
	_Atomic uint64_t done[NUM_DEEDS], failed[NUM_DEEDS];
};

static struct tally own_tally;
static struct tally *tally = &own_tally;

/* The same for all that have the descriptor. By a system call of our own: it is no memory of the program that is tested. */
static void share_tally(int fd)
{
	long at = raw_call(SYS_mmap, 0, sizeof(*tally), BOTH, MAP_SHARED, fd, 0);

	if (at == -1) {
		printf("FAILED: no tally: %s\n", strerror(errno));
		_exit(5);
	}
	tally = (struct tally *)at;
}

static void did(enum deed deed, uint64_t times)
{
	atomic_fetch_add(&tally->done[deed], times);
}

/* Of trusted processes only: a forked child of another would lack the huge pages that the kernel does not copy. */
static int is_wanted(int deed, int trusted)
{
	return trusted || (deed != DEED_HUGE_MMAP && deed != DEED_HUGE_MUNMAP);
}

/* Chance. */

static uint64_t random_state;

static uint64_t mix(uint64_t word)
{
	word = (word ^ word >> 33) * 0xff51afd7ed558ccdU;
	word = (word ^ word >> 29) * 0xc4ceb9fe1a85ec53U;
	return word ^ word >> 32;
}

static uint64_t draw(uint64_t below)
{
	random_state += 0x9e3779b97f4a7c15U;
	return mix(random_state) % below;
}

/* Memory, and what it must hold: words that follow from a tag, or the same word everywhere. */

enum kind { SMALL = 1, LARGE = 2, PRIVATE = 4, SHARED = 8, HUGE = 16, BREAK = 32, STACK = 64 };
enum { MAPPED = PRIVATE | SHARED, ANY = 127 };

struct piece {
	uint64_t *at;
	size_t bytes;
	uint64_t tag;
	size_t from; /* the word of the tag that the first word is */
	int constant;
	enum kind kind;
	int prot;
	int out; /* of the reach of devices; what is not readable and writable always is */
};

static struct piece pieces[PIECES];
static int count;
static uint64_t given_seed;
static int trusted, is_child;

static void wrong(const char *what, const struct piece *piece, size_t word)
{
	printf("WRONG: seed %llu, process %d: %s: word %zu of %zu bytes at %p (kind %d)\n",
	       (unsigned long long)given_seed, (int)getpid(), what, word, piece->bytes, (void *)piece->at,
	       (int)piece->kind);
	fflush(stdout);
	_exit(3);
}

static void failed(const char *what, const char *why)
{
	printf("FAILED: seed %llu, process %d: %s: %s\n", (unsigned long long)given_seed, (int)getpid(), what, why);
	fflush(stdout);
	_exit(4);
}

/* A call of the kernel or of the C library that has failed. */
static void broke(enum deed deed)
{
	int why = errno;

	atomic_fetch_add(&tally->failed[deed], 1);
	failed(deeds[deed], strerror(why));
}

static uint64_t word_of(const struct piece *piece, size_t index)
{
	return piece->constant ? piece->tag : mix(piece->tag + piece->from + index);
}

static void *end_of(const struct piece *piece)
{
	return (char *)piece->at + piece->bytes;
}

static void now_all(struct piece *piece, uint64_t word)
{
	piece->tag = word;
	piece->constant = 1;
}

static void write_all(struct piece *piece)
{
	if (piece->prot != BOTH)
		return;
	piece->tag = draw(UINT64_MAX);
	piece->from = 0;
	piece->constant = 0;
	for (size_t i = 0; i < piece->bytes / 8; i++)
		piece->at[i] = word_of(piece, i);
}

static void look(const struct piece *piece, const char *what)
{
	if (!(piece->prot & PROT_READ))
		return;
	for (size_t i = 0; i < piece->bytes / 8; i++)
		if (piece->at[i] != word_of(piece, i))
			wrong(what, piece, i);
}

/* No device may reach any page of this. */
static void must_be_refused(const struct piece *piece, const char *what)
{
	size_t page = draw(piece->bytes / PAGE);
	uint64_t sum;
	int status = gpu_sum(piece->at + page * PAGE_WORDS, PAGE, &sum);

	if (status == 0) {
		printf("reached by a device: ");
		wrong(what, piece, page * PAGE_WORDS);
	}
	if (status != -EFAULT)
		failed(what, gpu_why());
	did(DEED_REFUSED, 1);
}

static void look_by_device(const struct piece *piece, const char *what)
{
	uint64_t expected = 0, sum = 0;

	if (piece->out) {
		must_be_refused(piece, what);
		return;
	}
	for (size_t i = 0; i < piece->bytes / 8; i++)
		expected += word_of(piece, i);
	if (gpu_sum(piece->at, piece->bytes, &sum) < 0)
		failed(what, gpu_why());
	did(DEED_LOOKED_AT, piece->bytes);
	if (sum != expected) {
		printf("by a device: ");
		wrong(what, piece, 0);
	}
}

static void look_by_both(const struct piece *piece, const char *what)
{
	look(piece, what);
	look_by_device(piece, what);
}

static void fill_by_device(struct piece *piece)
{
	uint64_t word = draw(UINT64_MAX);
	int status = gpu_fill(piece->at, piece->bytes, word);

	if (piece->out) {
		if (status == 0)
			wrong("filled by a device that must not reach it", piece, 0);
		if (status != -EFAULT)
			failed("a fill of what is out of reach", gpu_why());
		did(DEED_REFUSED, 1);
		look(piece, "after a fill that was refused");
		return;
	}
	if (status < 0)
		failed("a fill", gpu_why());
	did(DEED_FILLED, piece->bytes);
	now_all(piece, word);
	look(piece, "after a fill by a device");
}

/* The table. */

static struct piece *add(void *at, size_t bytes, enum kind kind)
{
	struct piece *piece = &pieces[count++];

	*piece = (struct piece){ .at = at, .bytes = bytes, .constant = 1, .kind = kind, .prot = BOTH };
	return piece;
}

/* Memory that must be zeros. */
static void add_zeros(void *at, size_t bytes, enum kind kind)
{
	struct piece *piece = add(at, bytes, kind);

	look_by_both(piece, "new memory");
	write_all(piece);
}

static void forget(int index)
{
	pieces[index] = pieces[--count];
}

/* Any piece of these kinds, or -1. */
static int some(unsigned kinds)
{
	int first = count > 0 ? (int)draw(count) : 0;

	for (int i = 0; i < count; i++) {
		int index = (first + i) % count;

		if (pieces[index].kind & kinds)
			return index;
	}
	return -1;
}

/* Makes two pieces of one. Returns the second, which begins with that page. */
static int split(int index, size_t page)
{
	struct piece *piece = &pieces[index], rest = *piece;

	rest.at += page * PAGE_WORDS;
	rest.from += page * PAGE_WORDS;
	rest.bytes -= page * PAGE;
	piece->bytes = page * PAGE;
	pieces[count] = rest;
	return count++;
}

/* The piece, or a part from the middle of it, as another piece. */
static int part_of(int index)
{
	size_t pages = pieces[index].bytes / PAGE, first, last;

	if (!(pieces[index].kind & MAPPED) || pages < 3 || count + 2 > PIECES || draw(2) == 0)
		return index;
	first = 1 + draw(pages - 2);
	last = first + draw(pages - 1 - first);
	split(index, last + 1);
	return split(index, first);
}

/* Deeds. */

static void *map_shared(void *at, size_t bytes, int flags)
{
	int fd = draw(2) == 0 ? memfd_create("life", MFD_CLOEXEC) : -1;
	void *mapped;

	if (fd >= 0 && ftruncate(fd, (off_t)bytes) != 0)
		broke(DEED_MMAP_SHARED);
	mapped = mmap(at, bytes, BOTH, MAP_SHARED | flags | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0);
	if (mapped == MAP_FAILED)
		broke(DEED_MMAP_SHARED);
	if (fd >= 0)
		close(fd);
	did(DEED_MMAP_SHARED, 1);
	return mapped;
}

static void *map_private(void *at, size_t bytes, int flags)
{
	void *mapped = mmap(at, bytes, BOTH, ANONYMOUS | flags, -1, 0);

	if (mapped == MAP_FAILED)
		broke(DEED_MMAP);
	did(DEED_MMAP, 1);
	return mapped;
}

static size_t some_bytes(int large)
{
	return large ? LARGE_BLOCK + (1 + draw(MAX_PAGES)) * PAGE : (1 + draw(200)) * 16;
}

static void add_block(int large)
{
	size_t bytes = some_bytes(large);
	void *at = malloc(bytes);

	if (at == NULL)
		broke(large ? DEED_MALLOC_LARGE : DEED_MALLOC);
	did(large ? DEED_MALLOC_LARGE : DEED_MALLOC, 1);
	write_all(add(at, bytes, large ? LARGE : SMALL));
}

static void add_huge_page(void)
{
	void *at;

	if (!trusted || some(HUGE) >= 0)
		return;
	at = mmap(NULL, HUGE_PAGE, BOTH, ANONYMOUS | MAP_HUGETLB, -1, 0);
	/* Others may have them all, and they stay the agent's for a while when their process was killed. */
	if (at == MAP_FAILED && errno == ENOMEM) {
		atomic_fetch_add(&tally->failed[DEED_HUGE_MMAP], 1);
		return;
	}
	if (at == MAP_FAILED)
		broke(DEED_HUGE_MMAP);
	did(DEED_HUGE_MMAP, 1);
	add_zeros(at, HUGE_PAGE, HUGE);
}

static void add_some(void)
{
	size_t bytes = (1 + draw(MAX_PAGES)) * PAGE;

	if (count == PIECES)
		return;
	switch (draw(10)) {
	case 0:
	case 1:
		add_block(0);
		break;
	case 2:
		add_block(1);
		break;
	case 3:
		add_huge_page();
		break;
	case 4:
	case 5:
	case 6:
		add_zeros(map_shared(NULL, bytes, 0), bytes, SHARED);
		break;
	default:
		add_zeros(map_private(NULL, bytes, 0), bytes, PRIVATE);
	}
}

/* Whether a call is made by its number, and not by its function. */
static int by_number(void)
{
	int chosen = (int)draw(2);

	did(DEED_BY_NUMBER, (uint64_t)chosen);
	return chosen;
}

static void unmap(const struct piece *piece, enum deed deed)
{
	if ((by_number() ? syscall(SYS_munmap, piece->at, piece->bytes) : munmap(piece->at, piece->bytes)) != 0)
		broke(deed);
	did(deed, 1);
}

static void take_away(void)
{
	int whole = some(ANY & ~(BREAK | STACK)), index = whole < 0 ? -1 : part_of(whole), status;
	struct gpu_job *job = NULL;
	struct piece gone;

	if (index < 0)
		return;
	gone = pieces[index];
	/* Sometimes while a device writes there: it may be through, but if not it is told, and it writes nowhere else. What a
	 * child shares its parent has, too. */
	if (gone.kind != SMALL && !(is_child && gone.kind == SHARED) && !gone.out && draw(4) != 0) {
		job = gpu_begin_fill(gone.at, gone.bytes, draw(UINT64_MAX));
		if (job == NULL)
			failed("a fill of what goes", gpu_why());
	}
	if (gone.kind & (SMALL | LARGE)) {
		free(gone.at);
		did(DEED_FREE, 1);
	} else {
		unmap(&gone, gone.kind == HUGE ? DEED_HUGE_MUNMAP : index == whole ? DEED_MUNMAP : DEED_HOLE);
	}
	forget(index);
	status = job == NULL ? 0 : gpu_end(job);
	if (status == -EFAULT)
		did(DEED_GONE_IN_USE, 1);
	else if (status < 0)
		failed("a fill of what went", gpu_why());
	/* Blocks that are not large stay the C library's. */
	if (gone.kind != SMALL)
		must_be_refused(&gone, "unmapped");
}

static void map_over(void)
{
	int index = some(MAPPED);
	struct piece *piece;
	void *at;

	if (index < 0)
		return;
	piece = &pieces[part_of(index)];
	*piece = (struct piece){ .at = piece->at, .bytes = piece->bytes, .constant = 1, .kind = PRIVATE, .prot = BOTH };
	if (draw(3) == 0) {
		piece->kind = SHARED;
		at = map_shared(piece->at, piece->bytes, MAP_FIXED);
	} else {
		at = map_private(piece->at, piece->bytes, MAP_FIXED);
	}
	if (at != piece->at)
		wrong("mapped at another place", piece, 0);
	did(DEED_OVER, 1);
	look_by_both(piece, "mapped over");
	write_all(piece);
}

static void resize_block(struct piece *piece)
{
	int large = draw(3) == 0;
	size_t bytes = some_bytes(large);
	void *at = realloc(piece->at, bytes);

	if (at == NULL)
		broke(DEED_REALLOC);
	did(DEED_REALLOC, 1);
	piece->at = at;
	piece->kind = large ? LARGE : SMALL;
	piece->bytes = bytes < piece->bytes ? bytes : piece->bytes;
	look_by_both(piece, "after realloc");
	piece->bytes = bytes;
	write_all(piece);
}

static void move_mapping(struct piece *piece)
{
	struct piece old = *piece;
	void *to = mmap(NULL, piece->bytes, PROT_NONE, ANONYMOUS, -1, 0);

	if (to == MAP_FAILED || mremap(piece->at, piece->bytes, piece->bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		broke(DEED_MOVE);
	did(DEED_MOVE, 1);
	piece->at = to;
	/* Private memory is new memory with the same contents. */
	if (piece->kind == PRIVATE)
		piece->out = piece->prot != BOTH;
	look_by_both(piece, "after a move");
	must_be_refused(&old, "moved away from");
}

static void resize_mapping(struct piece *piece)
{
	size_t bytes = (1 + draw(MAX_PAGES)) * PAGE, kept = bytes < piece->bytes ? bytes : piece->bytes;
	struct piece old = *piece, *more;
	void *at;

	/* What is added becomes a piece of its own. */
	if (count == PIECES)
		bytes = kept;
	at = mremap(piece->at, piece->bytes, bytes, MREMAP_MAYMOVE);
	if (at == MAP_FAILED)
		broke(DEED_MREMAP);
	did(DEED_MREMAP, 1);
	if (at != piece->at)
		piece->out = piece->prot != BOTH;
	piece->at = at;
	piece->bytes = kept;
	look_by_both(piece, "after mremap");
	if (bytes > kept) {
		more = add(end_of(piece), bytes - kept, PRIVATE);
		more->prot = piece->prot;
		more->out = piece->prot != BOTH;
		look_by_both(more, "added by mremap");
		write_all(more);
	}
	if (at != old.at) {
		must_be_refused(&old, "moved away from");
	} else if (kept < old.bytes) {
		old.at += kept / 8;
		old.bytes -= kept;
		must_be_refused(&old, "cut off");
	}
}

static void resize(void)
{
	int index = some(SMALL | LARGE | MAPPED);

	if (index < 0)
		return;
	if (pieces[index].kind & (SMALL | LARGE)) {
		resize_block(&pieces[index]);
		return;
	}
	index = part_of(index);
	/* A file has no more pages. */
	if (pieces[index].kind == SHARED || draw(2) == 0)
		move_mapping(&pieces[index]);
	else
		resize_mapping(&pieces[index]);
}

static void advise(const struct piece *piece, int advice, enum deed deed)
{
	void *at = piece->at;

	if ((by_number() ? syscall(SYS_madvise, at, piece->bytes, advice) : madvise(at, piece->bytes, advice)) != 0)
		broke(deed);
	did(deed, 1);
}

static void drop_contents(void)
{
	int index = some(MAPPED | HUGE | BREAK);
	struct piece *piece;

	if (index < 0)
		return;
	piece = &pieces[part_of(index)];
	advise(piece, MADV_DONTNEED, DEED_DONTNEED);
	/* Of shared memory only the entries in the page table go. */
	if (piece->kind != SHARED)
		now_all(piece, 0);
	look_by_both(piece, "after MADV_DONTNEED");
}

/* The kernel may free these pages until they are written to. */
static void drop_contents_lazily(void)
{
	int index = some(PRIVATE);
	uint64_t seen = 0, sum;
	struct piece *piece;

	if (index < 0 || pieces[index].prot != BOTH)
		return;
	piece = &pieces[part_of(index)];
	advise(piece, MADV_FREE, DEED_LAZILY);
	for (size_t i = 0; i < piece->bytes / 8; i++) {
		uint64_t word = *(volatile uint64_t *)&piece->at[i];

		if (word != 0 && word != word_of(piece, i))
			wrong("after MADV_FREE", piece, i);
		seen += word;
	}
	if (!piece->out) {
		if (gpu_sum(piece->at, piece->bytes, &sum) < 0)
			failed("after MADV_FREE", gpu_why());
		if (sum != seen)
			wrong("after MADV_FREE, by a device", piece, 0);
	}
	write_all(piece);
	look_by_both(piece, "written after MADV_FREE");
}

/* Holes in a file: the agent has the pages that were there, so no device may reach them. */
static void punch(void)
{
	int index = some(SHARED);
	struct piece *piece;

	if (index < 0 || pieces[index].prot != BOTH)
		return;
	piece = &pieces[part_of(index)];
	advise(piece, MADV_REMOVE, DEED_REMOVE);
	now_all(piece, 0);
	piece->out = 1;
	look_by_both(piece, "after MADV_REMOVE");
	write_all(piece);
}

/* Protected memory stays out of reach when it is writable again, and whole. */
static void protect(void)
{
	int index = some(MAPPED), prot = draw(2) == 0 ? PROT_NONE : PROT_READ;
	struct piece *piece;
	enum deed deed;
	void *at;

	if (index < 0)
		return;
	piece = &pieces[part_of(index)];
	deed = piece->prot == BOTH ? DEED_PROTECT : DEED_BACK;
	piece->prot = piece->prot == BOTH ? prot : BOTH;
	piece->out = 1;
	at = piece->at;
	prot = piece->prot;
	if ((by_number() ? syscall(SYS_mprotect, at, piece->bytes, prot) : mprotect(at, piece->bytes, prot)) != 0)
		broke(deed);
	did(deed, 1);
	look_by_both(piece, "protected");
	fill_by_device(piece);
}

/* The program break. Nothing else moves it. */
static void move_break(void)
{
	int index = some(BREAK);
	size_t bytes = (1 + draw(MAX_PAGES / 2)) * PAGE;
	struct piece *piece, part;
	void *at;

	if (index < 0 && count == PIECES)
		return;
	if (index < 0 || draw(2) == 0) {
		at = sbrk((intptr_t)bytes);
		if (at == (void *)-1)
			broke(DEED_SBRK_UP);
		did(DEED_SBRK_UP, 1);
		piece = index < 0 ? add(at, 0, BREAK) : &pieces[index];
		piece->out = !trusted;
		part = (struct piece){ .at = at, .bytes = bytes, .constant = 1, .kind = BREAK, .prot = BOTH };
		part.out = piece->out;
		if (at != end_of(piece))
			wrong("not where the break was", &part, 0);
		look_by_both(&part, "added by sbrk");
		if (piece->bytes > 0)
			look_by_both(piece, "below what sbrk added");
		piece->bytes += bytes;
		write_all(piece);
		return;
	}
	part = pieces[index];
	piece = &pieces[index];
	if (bytes > piece->bytes)
		bytes = piece->bytes;
	if (sbrk(-(intptr_t)bytes) == (void *)-1)
		broke(DEED_SBRK_DOWN);
	did(DEED_SBRK_DOWN, 1);
	piece->bytes -= bytes;
	part.at += piece->bytes / 8;
	part.bytes = bytes;
	must_be_refused(&part, "above the break");
	if (piece->bytes > 0)
		look_by_both(piece, "below the break");
	else
		forget(index);
}

static _Noreturn void be_a_child(uint64_t word)
{
	is_child = 1;
	gpu_open_all();
	for (int i = 0; i < count; i++) {
		struct piece *piece = &pieces[i];

		/* What the parent had protected is its own, and readable and writable when it first asks for a device. */
		if (piece->kind == PRIVATE && piece->prot == BOTH)
			piece->out = 0;
		look_by_both(piece, "in a child");
		if (piece->kind != SHARED)
			fill_by_device(piece);
		else if (!piece->out && gpu_fill(piece->at, piece->bytes, word) < 0)
			failed("a fill of shared memory", gpu_why());
	}
	take_away();
	_exit(0);
}

/* Both keep a right view: the child of the moment of the fork, the parent of its own; but they share what is shared. */
static void have_a_child(void)
{
	uint64_t word = draw(UINT64_MAX);
	int status;
	pid_t child;

	fflush(stdout);
	child = fork();
	/* The kernel copies huge pages that are pinned, so it may lack some. */
	if (child < 0 && errno == ENOMEM && some(HUGE) >= 0) {
		atomic_fetch_add(&tally->failed[DEED_FORK], 1);
		return;
	}
	if (child < 0)
		broke(DEED_FORK);
	if (child == 0)
		be_a_child(word);
	did(DEED_FORK, 1);
	for (int i = 0; i < count; i++)
		if (i % 2 == 0 && pieces[i].kind != SHARED)
			fill_by_device(&pieces[i]);
	if (waitpid(child, &status, 0) != child)
		failed("a child", strerror(errno));
	/* Nobody kills a child. */
	if (WIFSIGNALED(status))
		failed("a child died of", strsignal(WTERMSIG(status)));
	if (WEXITSTATUS(status) != 0)
		_exit(WEXITSTATUS(status));
	for (int i = 0; i < count; i++) {
		if (pieces[i].kind == SHARED && !pieces[i].out)
			now_all(&pieces[i], word);
		look_by_both(&pieces[i], "after a child");
	}
}

/* A life. */

static atomic_int enough;

/* Keeps a device busy with memory that stays. */
static void *watch(void *unused)
{
	enum { WORDS = 4096 };
	uint64_t *words = malloc(WORDS * 8), expected = 0, sum;

	for (size_t i = 0; words != NULL && i < WORDS; i++)
		expected += words[i] = mix(given_seed + i);
	while (words != NULL && !enough) {
		if (gpu_sum(words, WORDS * 8, &sum) < 0)
			failed("a sum beside", gpu_why());
		if (sum != expected)
			wrong("memory that nobody changes", &(struct piece){ .at = words, .bytes = WORDS * 8 }, 0);
	}
	free(words);
	return unused;
}

static void step(void)
{
	int index = some(ANY);

	switch (draw(20)) {
	case 0:
	case 1:
		look_by_both(&pieces[index], "by both");
		break;
	case 2:
	case 3:
		fill_by_device(&pieces[index]);
		break;
	case 4:
		write_all(&pieces[index]);
		look_by_device(&pieces[index], "what the process wrote");
		break;
	case 5:
	case 6:
		take_away();
		break;
	case 7:
		map_over();
		break;
	case 8:
	case 9:
		resize();
		break;
	case 10:
		drop_contents();
		break;
	case 11:
		drop_contents_lazily();
		break;
	case 12:
		punch();
		break;
	case 13:
	case 14:
		protect();
		break;
	case 15:
		move_break();
		break;
	case 16:
		if (draw(2) == 0)
			have_a_child();
		break;
	default:
		add_some();
	}
}

/* Another program takes this one's place, while a device writes. */
static void execute(int fd)
{
	int index = some(ANY & ~STACK);
	char seed[32], counts[16];

	if (index >= 0 && !pieces[index].out)
		gpu_begin_fill(pieces[index].at, pieces[index].bytes, draw(UINT64_MAX));
	snprintf(seed, sizeof(seed), "%llu", (unsigned long long)draw(UINT64_MAX));
	snprintf(counts, sizeof(counts), "%d", fd);
	did(DEED_EXEC, 1);
	execl("/proc/self/exe", "life", "again", trusted ? "trusted" : "strict", seed, counts, (char *)NULL);
	broke(DEED_EXEC);
}

static int live(uint64_t seed, int fd, int last)
{
	enum { SPARE = 256 << 10 };
	_Alignas(PAGE) uint64_t words[STACK_WORDS];
	void *spare = malloc(SPARE);
	pthread_t thread;

	given_seed = seed;
	random_state = mix(seed);
	gpu_open_all();
	/* Small blocks come from here, so none needs a mapping where there just was another. */
	free(spare);
	if (sbrk((intptr_t)(-(uintptr_t)sbrk(0) % PAGE)) == (void *)-1)
		broke(DEED_SBRK_UP);
	add(words, sizeof(words), STACK)->out = !trusted;
	write_all(&pieces[0]);
	if (pthread_create(&thread, NULL, watch, NULL) != 0)
		failed("a thread", strerror(errno));
	for (int i = 0; i < STEPS; i++)
		step();
	for (int i = 0; i < count; i++)
		look_by_both(&pieces[i], "at the end");
	if (!last && draw(2) == 0)
		execute(fd);
	enough = 1;
	pthread_join(thread, NULL);
	return 0;
}

/* Those who live. */

struct place {
	pid_t pid;
	uint64_t kill_at; /* 0: it ends by itself */
	int killed;
};

static struct place places[MAX_PROCESSES];
static unsigned long lives, orphans, bad;

static uint64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void start_one(struct place *place, int fd)
{
	char seed[32], counts[16];

	*place = (struct place){ .kill_at = draw(2) == 0 ? now_ms() + 1 + draw(1 + draw(MAX_AGE_MS)) : 0 };
	snprintf(seed, sizeof(seed), "%llu", (unsigned long long)draw(UINT64_MAX));
	snprintf(counts, sizeof(counts), "%d", fd);
	fflush(stdout);
	place->pid = fork();
	if (place->pid < 0)
		broke(DEED_FORK);
	if (place->pid == 0) {
		execl("/proc/self/exe", "life", "once", trusted ? "trusted" : "strict", seed, counts, (char *)NULL);
		broke(DEED_EXEC);
	}
}

/* Returns where it lived; NULL: it was left behind by one that was killed. */
static struct place *on_end(pid_t pid, int status, int processes)
{
	struct place *place = places;

	while (place < places + processes && place->pid != pid)
		place++;
	if (place == places + processes)
		place = NULL;
	if (place == NULL)
		orphans++;
	else
		lives++;
	if (place != NULL && place->killed && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) {
		did(DEED_KILL, 1);
	} else if (status != 0) {
		bad++;
		printf("FAILED: process %d: %s %d\n", (int)pid, WIFSIGNALED(status) ? "signal" : "exit status",
		       WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
	}
	return place;
}

static int all_done(void)
{
	for (int deed = 0; deed < NUM_DEEDS; deed++)
		if (is_wanted(deed, trusted) && tally->done[deed] == 0)
			return 0;
	return 1;
}

static void print_counts(const char *name, const _Atomic uint64_t *counts, int zeros)
{
	const char *between = "";

	printf(", \"%s\": {", name);
	for (int deed = 0; deed < NUM_DEEDS; deed++) {
		if (!(zeros && is_wanted(deed, trusted)) && counts[deed] == 0)
			continue;
		printf("%s\"%s\": %llu", between, deeds[deed], (unsigned long long)counts[deed]);
		between = ", ";
	}
	printf("}");
}

static int run(long seconds, int processes, uint64_t seed)
{
	uint64_t end = now_ms() + (uint64_t)seconds * 1000;
	int fd = memfd_create("tally", 0), status;
	struct place *place;
	pid_t pid;

	random_state = seed;
	if (fd < 0 || ftruncate(fd, sizeof(*tally)) != 0)
		failed("a tally", strerror(errno));
	share_tally(fd);
	/* Whoever is left behind is this process' child then. */
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	for (int i = 0; i < processes; i++)
		start_one(&places[i], fd);
	while (now_ms() < end || (now_ms() < end + PATIENCE_MS && !all_done() && bad == 0)) {
		nanosleep(&(struct timespec){ .tv_nsec = 20000000 }, NULL);
		for (place = places; place < places + processes; place++)
			if (place->kill_at != 0 && !place->killed && now_ms() >= place->kill_at) {
				place->killed = 1;
				kill(place->pid, SIGKILL);
			}
		while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
			place = on_end(pid, status, processes);
			if (place != NULL)
				start_one(place, fd);
		}
	}
	while ((pid = waitpid(-1, &status, 0)) > 0)
		on_end(pid, status, processes);
	printf("{\"seed\": %llu, \"level\": \"%s\", \"lives\": %lu, \"orphans\": %lu, \"bad\": %lu",
	       (unsigned long long)seed, trusted ? "trusted" : "strict", lives, orphans, bad);
	print_counts("deeds", tally->done, 1);
	print_counts("failures", tally->failed, 0);
	printf("}\n");
	return bad != 0;
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	trusted = argc > 2 && strcmp(argv[2], "trusted") == 0;
	if (argc == 6 && strcmp(argv[1], "run") == 0) {
		int processes = atoi(argv[4]);

		if (processes >= 1 && processes <= MAX_PROCESSES)
			return run(atol(argv[3]), processes, strtoull(argv[5], NULL, 10));
	}
	if (argc >= 4 && (strcmp(argv[1], "once") == 0 || strcmp(argv[1], "again") == 0)) {
		int fd = argc == 5 ? atoi(argv[4]) : -1;

		if (fd >= 0)
			share_tally(fd);
		/* Alone it goes on to its end. */
		return live(strtoull(argv[3], NULL, 10), fd, fd < 0 || strcmp(argv[1], "again") == 0);
	}
	fprintf(stderr, "usage: life run LEVEL SECONDS PROCESSES SEED | life once LEVEL SEED\n");
	return 2;
}
