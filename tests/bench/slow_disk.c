/* A slow disk, as LD_PRELOAD: every write and sync of a regular file sleeps first.
 *
 * SLOW_WRITE_MS and SLOW_SYNC_MS say for how long. Sockets and pipes are as fast as ever, so that only the recording
 * can be held up, not the traffic by itself.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static void sleep_if_file(int fd, const char *variable) {
  struct stat about;
  const char *ms = getenv(variable);
  if (!ms || fstat(fd, &about) || !S_ISREG(about.st_mode)) return;
  struct timespec left = {atol(ms) / 1000, atol(ms) % 1000 * 1000000};
  nanosleep(&left, NULL);
}

#define SLOW(result, name, ms, parameters, arguments)                  \
  result name parameters {                                             \
    static result(*real) parameters;                                   \
    if (!real) real = (result(*) parameters)dlsym(RTLD_NEXT, #name);   \
    sleep_if_file(fd, ms);                                             \
    return real arguments;                                             \
  }
#define WRITE "SLOW_WRITE_MS"
#define SYNC "SLOW_SYNC_MS"

SLOW(ssize_t, write, WRITE, (int fd, const void *data, size_t size), (fd, data, size))
SLOW(ssize_t, pwrite, WRITE, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
SLOW(ssize_t, pwrite64, WRITE, (int fd, const void *data, size_t size, off64_t at),
     (fd, data, size, at))
SLOW(ssize_t, writev, WRITE, (int fd, const struct iovec *parts, int count), (fd, parts, count))
SLOW(int, fsync, SYNC, (int fd), (fd))
SLOW(int, fdatasync, SYNC, (int fd), (fd))
