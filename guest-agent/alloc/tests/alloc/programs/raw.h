/* System calls that libsvm_alloc.so does not see. */
#include <errno.h>
#include <unistd.h>

/* As `syscall`. */
static inline long raw_call(long number, long a, long b, long c, long d, long e, long f)
{
#ifdef __x86_64__
	register long fourth __asm__("r10") = d, fifth __asm__("r8") = e, sixth __asm__("r9") = f;
	__asm__ volatile("syscall"
			 : "+a"(number)
			 : "D"(a), "S"(b), "d"(c), "r"(fourth), "r"(fifth), "r"(sixth)
			 : "rcx", "r11", "memory");
	if (number >= 0 || number < -4095)
		return number;
	errno = (int)-number;
	return -1;
#else
	/* There it sees none. */
	return syscall(number, a, b, c, d, e, f);
#endif
}
