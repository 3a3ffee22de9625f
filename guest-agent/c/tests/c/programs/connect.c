/* Connects once, with a context of its own, and says how that went. */
#include <gpusvm.h>

#include <stdio.h>

int main(void)
{
	struct svm *svm;
	int told = svm_connect(NULL, &svm);

	printf("%d %s\n", told, told == 0 ? "connected" : svm_error());
	if (told == 0)
		svm_close(svm);
	return 0;
}
