/*
 * nap.c: sleep, then say when; loaded into the server's process by gil.py.
 *
 * Why C: the time must be taken after the sleep and before the GIL is asked for again, and Python code
 * always runs with the GIL. The one promise: the stamp is taken without it.
 */
#include <stdint.h>
#include <time.h>

/* CLOCK_MONOTONIC at the end of a sleep of that many nanoseconds (less than a second). */
int64_t nap(int64_t ns);

int64_t nap(int64_t ns) {
    struct timespec t = {.tv_nsec = ns};

    clock_nanosleep(CLOCK_MONOTONIC, 0, &t, 0);
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
