/* A time of day that is QMPVCPU_CLOCK_OFFSET seconds ahead, for programs that are run with this in LD_PRELOAD. Monotonic
   time stays the machine's. No headers, so that any compiler will do, without a C library to develop with. */
struct timespec { long tv_sec, tv_nsec; };
struct timeval { long tv_sec, tv_usec; };
extern long syscall(long number, ...);
extern char *getenv(const char *name);
extern double strtod(const char *text, char **end);

#ifdef __aarch64__
enum { SYS_clock_gettime = 113 };
#else
enum { SYS_clock_gettime = 228 };
#endif
enum { REALTIME = 0, REALTIME_COARSE = 5, BILLION = 1000000000 };

static long offset_ns(void) {
  static long known;
  static int is_known;
  if (!is_known) {
    const char *given = getenv("QMPVCPU_CLOCK_OFFSET");
    known = given ? (long)(strtod(given, 0) * BILLION) : 0;
    is_known = 1;
  }
  return known;
}

int clock_gettime(int clock, struct timespec *now) {
  int failed = syscall(SYS_clock_gettime, clock, now);
  if (!failed && (clock == REALTIME || clock == REALTIME_COARSE)) {
    long ns = now->tv_sec * BILLION + now->tv_nsec + offset_ns();
    now->tv_sec = ns / BILLION;
    now->tv_nsec = ns % BILLION;
  }
  return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
  struct timespec exact;
  int failed = clock_gettime(REALTIME, &exact);
  now->tv_sec = exact.tv_sec;
  now->tv_usec = exact.tv_nsec / 1000;
  return failed;
}

long time(long *stored) {
  struct timespec exact;
  clock_gettime(REALTIME, &exact);
  if (stored)
    *stored = exact.tv_sec;
  return exact.tv_sec;
}
