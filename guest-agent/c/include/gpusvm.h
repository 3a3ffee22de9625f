/*
 * gpusvm.h: a program's own memory on GPUs of the host, by plain pointers.
 *
 * In a guest where `svm-agent serve` runs, start the program with `svm-agent run -- PROGRAM` (or with
 * LD_PRELOAD=libsvm_alloc.so): from svm_open() on what malloc gives, globals and the stacks of threads are memory that GPUs
 * reach.
 * The shortest use, without checks:
 *
 *	struct svm *svm;
 *	struct svm_mirror *gpu;
 *	uint64_t list, result;
 *	svm_open(&svm);
 *	svm_mirror(svm, 0, &gpu);
 *	svm_device_address(gpu, head, &list);
 *	svm_device_address(gpu, out, &result);
 *	struct svm_packet walk = svm_packet_chase(result, list, 1000, list - (uintptr_t)head);
 *	svm_run(gpu, 0, &walk, 1);
 *	svm_unmirror(gpu);
 *	svm_close(svm);
 *
 * Conventions
 *	Functions that return int return 0 or a count, or a negative errno (-EINVAL and so on). svm_error() says in words
 *	what went wrong and what to do. Every function may return, besides what it lists:
 *		-EINVAL          an argument is NULL, or out of its range
 *		-EPIPE           the agent or the device has dropped this context: close all, and open again
 *		-ECHILD          the handle was opened by the parent process: open again after fork()
 *		-ENOTRECOVERABLE an error of this library, with its text
 *	What a function hands out (*out) is written only when it returns 0 or more, and is the caller's to give back.
 *	Handles may be given back in any order. Giving NULL back does nothing.
 *	Every function may be called by several threads at once, also with the same handle; but whoever gives a handle back
 *	does so when no other call with it is under way.
 *	Lengths and addresses are in bytes, times in milliseconds.
 */
#ifndef GPUSVM_H
#define GPUSVM_H

#include <stddef.h>
#include <stdint.h>

/* This header's version. svm_version() tells the library's. Another major number is not compatible. */
#define SVM_VERSION_MAJOR 0
#define SVM_VERSION_MINOR 1

#ifdef __cplusplus
extern "C" {
#endif

/* A connection to the agent: one context, which is an address space of this process on every device. */
struct svm;
/* This process' memory on one device. */
struct svm_mirror;
/* Packets that were launched. */
struct svm_job;

/* svm_device.fault_model */
#define SVM_FAULTS_REPLAYABLE 0 /* an access to a page that is not there waits for it */
#define SVM_FAULTS_HOST       1 /* as above, resolved by the host's kernel */
#define SVM_FAULTS_NONE       2 /* everything must be there before: cannot be mirrored on */

/* svm_device.address_model */
#define SVM_ADDRESSES_ANY      0
#define SVM_ADDRESSES_IDENTITY 1 /* the process' own addresses, and no others */

/* A device of the host. */
struct svm_device {
	uint32_t dev_id;        /* names it in svm_mirror() */
	uint32_t va_bits;       /* its addresses are below 1 << va_bits */
	uint32_t fault_model;   /* SVM_FAULTS_* */
	uint32_t address_model; /* SVM_ADDRESSES_* */
	uint32_t num_engines;   /* jobs that it executes at the same time */
	uint32_t reserved;      /* 0 */
	uint64_t opcodes;       /* bit n: it executes packets with opcode n (SVM_OP_*) */
	uint64_t flags;         /* DEVICE_* of the protocol, section 4.2 */
	char name[40];          /* for people: UTF-8, ended by a zero */
};

/* svm_packet.opcode */
#define SVM_OP_NOP        0
#define SVM_OP_COPY       1 /* len bytes from src to dst */
#define SVM_OP_FILL       2 /* len bytes at dst with the word value */
#define SVM_OP_REDUCE     3 /* the sum of the words in len bytes at src, to dst */
#define SVM_OP_AXPY       4 /* y[i] += a * x[i], doubles: y at dst, x at src, a the bits of value; len bytes each */
#define SVM_OP_CHASE      5 /* walks a list: see svm_packet_chase() */
#define SVM_OP_ATOMIC_ADD 6 /* adds value to the word at dst */
#define SVM_OP_SEM_WAIT   7 /* waits until the word at dst is at least value */
#define SVM_OP_SEM_SIGNAL 8 /* stores value at dst, after everything before it */

/*
 * One step of a job. Addresses are the device's (svm_device_address()). Words are 64 bits wide and stand at multiples of 8.
 * Fields that an opcode does not name are 0; so begin with an initializer.
 */
struct svm_packet {
	uint32_t opcode; /* SVM_OP_* */
	uint32_t flags;  /* 0 */
	uint64_t dst;
	uint64_t src;
	uint64_t len;
	uint64_t value;
	uint64_t arg;
	uint64_t reserved[2]; /* 0 */
};

/* Most packets in one job. */
#define SVM_MAX_PACKETS 1024
/* Rings of a mirror: numbers below this. Jobs of one ring run in order, rings run side by side. */
#define SVM_MAX_RINGS 64

/* svm_failure.access */
#define SVM_ACCESS_READ   1
#define SVM_ACCESS_WRITE  2
#define SVM_ACCESS_ATOMIC 16

/* How a job failed. */
struct svm_failure {
	int32_t error;    /* negative errno, as the job's functions return it */
	uint32_t packet;  /* index of the packet that failed */
	uint64_t address; /* the device's address of the access, where there was one */
	uint32_t access;  /* SVM_ACCESS_* of it, or 0 */
	uint32_t reserved; /* 0 */
};

/* Connections */

/*
 * Joins the context in which libsvm_alloc.so has this process' memory. A process can do so once at a time: pass the handle
 * on to whoever needs it. A forked child has a context of its own, and opens it after fork().
 *
 * The first call of a process brings what memory it has by then into reach, at the same addresses: other threads stand
 * still meanwhile, and calls of theirs that the handler of any signal ends (poll, epoll_wait, nanosleep, sem_timedwait,
 * sigwaitinfo, pause) end with EINTR. Nothing may be under way that goes by pages and not by addresses: reads with O_DIRECT,
 * operations of an io_uring, vmsplice. What has pinned memory before (buffers registered with io_uring, RDMA) goes on with
 * the old pages: register them afterwards. Memory that a userfaultfd watches by then stays out of reach.
 *
 * -ENOTCONN  the program runs without libsvm_alloc.so, or that has no agent
 * -EBUSY     another part of the process has joined: use its handle
 * -ENOENT, -ECONNREFUSED, -EACCES  no agent listens any more
 */
int svm_open(struct svm **out);

/*
 * Connects to an agent with a context of its own, in which only memory of svm_map() is in reach: for programs that run
 * without libsvm_alloc.so. `socket` is a path; NULL: what SVM_AGENT_SOCKET names, or /run/svm-agent.sock.
 *
 * -ENOENT, -ECONNREFUSED, -EACCES  no agent listens there
 * -ENOSPC    the host or the agent has as many contexts as it may have, or as many of this user's (svm_error() says which
 *            limit it is)
 */
int svm_connect(const char *socket, struct svm **out);

/* Closes a connection. Its context ends with its last handle (mirrors, jobs). */
void svm_close(struct svm *svm);

/*
 * Describes the first `room` devices, in the order of their dev_id. Returns how many there are in all, which may be more.
 * `out` may be NULL if `room` is 0.
 */
int svm_devices(struct svm *svm, struct svm_device *out, size_t room);

/* Memory */

/*
 * Makes memory that GPUs reach and maps it in this process, zeroed: at `address` (a multiple of 4096), or where there is
 * room if that is NULL. `length` is rounded up to pages of 4096. Not needed where libsvm_alloc.so is loaded. It stays
 * until svm_unmap() or svm_close().
 *
 * -EEXIST  something else is mapped at `address`
 * -ENOSPC  a limit of the agent or the host is reached (svm_error() names it)
 * -ENOMEM  the guest has not enough memory
 */
int svm_map(struct svm *svm, void *address, size_t length, void **out);

/*
 * Unmaps memory of svm_map() and gives it back; returns when no GPU can reach it any more.
 *
 * -ENOENT  no memory of svm_map() with this handle begins at `address`
 */
int svm_unmap(struct svm *svm, void *address);

/* Mirrors */

/*
 * Shows this process' memory on a device. Costs nothing until the device touches it, and follows the process: what malloc
 * gives later is there too. On a device with at least 47 address bits every address is the same on both sides; on one with
 * fewer, memory is shown in windows (svm_device_address()).
 *
 * -ENOENT      no such device
 * -EEXIST      the process is mirrored there already, in this context: use that mirror, or svm_unmirror() it first
 * -EOPNOTSUPP  the device has no page faults, so it cannot
 * -ERANGE      the device has too few address bits for what the process uses
 * -ENOSPC      a limit of the host is reached (svm_error() names it)
 */
int svm_mirror(struct svm *svm, uint32_t dev_id, struct svm_mirror **out);

/*
 * svm_mirror() on every device that can be mirrored on, in the order of their dev_id: all, or none and an error. Returns
 * how many. Devices without page faults are left out.
 *
 * -ENODEV  there is no such device
 * -ENOBUFS there are more than `room`: svm_devices() says how many can be at most
 * and as svm_mirror()
 */
int svm_mirror_all(struct svm *svm, struct svm_mirror **out, size_t room);

/* Ends a mirror. Its jobs that have not ended end with -ECANCELED. */
void svm_unmirror(struct svm_mirror *mirror);

/* Describes the device of a mirror. */
int svm_mirror_device(const struct svm_mirror *mirror, struct svm_device *out);

/*
 * Where the device of a mirror sees `pointer`: the same number where its addresses are the process' own. Pointers that are
 * near each other (of one heap) have the same distance to it.
 *
 * -EFAULT  it does not: the memory came after the mirror was made, beyond its windows. End the mirror and make it again.
 *          0 does not promise that the memory is in reach; the job that touches it tells.
 */
int svm_device_address(const struct svm_mirror *mirror, const void *pointer, uint64_t *out);

/* Jobs */

/*
 * Launches 1 to SVM_MAX_PACKETS packets as one job on ring `ring` (below SVM_MAX_RINGS), and waits for its end. What the
 * job has written is there when this returns. 0: it ended well. Errors of svm_submit(), and those of a job:
 *
 * -EFAULT     it touched an address that is no memory in reach: svm_error() says which memory that is, and what to do
 * -EINVAL     a packet is wrong, or a node of a list stands at no multiple of 16
 * -EPERM      it wrote to what it may only read
 * -ETIMEDOUT  it ran longer than its device allows, or a fault was not answered
 * -ECANCELED  the mirror ended, or the device has lost it
 * -ENOMEM, -ENOSPC  the device's tables are full
 */
int svm_run(struct svm_mirror *mirror, uint32_t ring, const struct svm_packet *packets, size_t count);

/*
 * As svm_run(), but returns when the job is launched. Its packets and what they read must stay as they are until it ends;
 * the array of packets itself may go at once.
 *
 * -ENOSPC  too many jobs are in flight (svm_error() names the limit)
 * -EPIPE   the mirror is unusable after an error of its device: end it and make another
 */
int svm_submit(struct svm_mirror *mirror, uint32_t ring, const struct svm_packet *packets, size_t count,
	struct svm_job **out);

/* Whether a job has ended by now: 1 it ended well, 0 not yet, or as svm_run(). Does not wait. May be asked again. */
int svm_job_poll(struct svm_job *job);

/* As svm_job_poll(), but waits for the end for at most `timeout_ms`; -1: for ever. 0: it has not ended in that time. */
int svm_job_wait(struct svm_job *job, int timeout_ms);

/*
 * How a job that has ended with an error failed. Returns 0.
 *
 * -EAGAIN  it has not ended, or ended well
 */
int svm_job_failure(struct svm_job *job, struct svm_failure *out);

/* Gives a handle back. A job that has not ended goes on, and how it ends is forgotten. */
void svm_job_free(struct svm_job *job);

/*
 * A file descriptor for poll(2), select(2) and epoll(7) in place of calls that wait. It is readable (POLLIN) while a job has
 * ended and svm_job_poll() or svm_job_wait() has not yet told that; then ask all jobs that have not ended. It may be
 * readable for nothing, and stays readable when the agent has gone, of which the jobs tell. It is the library's: it lasts
 * until svm_close(), nothing may be read from it, and it must not be closed.
 *
 * -EMFILE, -ENFILE  no descriptor is free
 */
int svm_fd(struct svm *svm);

/* Errors and versions */

/*
 * What went wrong in the last call of this thread that failed, in words that say what to do; "" if none did. Valid until
 * the thread's next call that fails, or its end.
 */
const char *svm_error(void);

/* The library's version: major << 16 | minor. */
uint32_t svm_version(void);

/* Packets, ready made */

/*
 * Walks a list of {uint64_t next; uint64_t payload;}, which stand at multiples of 16 as malloc gives them. Begins at
 * `first`, ends at a next of 0 or after `max_nodes` nodes. Stores at `dst` how many it saw, and behind it the sum of their
 * payloads, modulo 1 << 64. `link_offset` is added to each next that is not 0: the device's address minus the process' own
 * one, 0 where they are the same.
 */
static inline struct svm_packet svm_packet_chase(uint64_t dst, uint64_t first, uint64_t max_nodes, uint64_t link_offset)
{
	struct svm_packet packet = {SVM_OP_CHASE, 0, dst, first, 0, max_nodes, link_offset, {0, 0}};
	return packet;
}

/* Copies `len` bytes. */
static inline struct svm_packet svm_packet_copy(uint64_t dst, uint64_t src, uint64_t len)
{
	struct svm_packet packet = {SVM_OP_COPY, 0, dst, src, len, 0, 0, {0, 0}};
	return packet;
}

/* Fills `len` bytes with a word; `dst` and `len` are multiples of 8. */
static inline struct svm_packet svm_packet_fill(uint64_t dst, uint64_t len, uint64_t word)
{
	struct svm_packet packet = {SVM_OP_FILL, 0, dst, 0, len, word, 0, {0, 0}};
	return packet;
}

/* Stores at `dst` the sum of the words in `len` bytes at `src`; all are multiples of 8. */
static inline struct svm_packet svm_packet_reduce(uint64_t dst, uint64_t src, uint64_t len)
{
	struct svm_packet packet = {SVM_OP_REDUCE, 0, dst, src, len, 0, 0, {0, 0}};
	return packet;
}

/* Adds `value` to the word at `dst`, atomically. */
static inline struct svm_packet svm_packet_atomic_add(uint64_t dst, uint64_t value)
{
	struct svm_packet packet = {SVM_OP_ATOMIC_ADD, 0, dst, 0, 0, value, 0, {0, 0}};
	return packet;
}

#ifdef __cplusplus
}
#endif

#endif
