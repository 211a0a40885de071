/* Stand between a program and libc, and at the n-th call that changes a watched folder kill the process, tear a write,
 * or let the disk fail; or keep a log of all of them.
 *
 * Loaded by LD_PRELOAD. It does nothing until ttl_arm() is called, and then counts over all threads of the process.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum mode { OFF, COUNT, KILL, TORN, FAIL, SHORT, LOG };
enum kind { CREATE, WRITE, SYNC, RENAME, MAKE, FREE, CHANGE };
enum verdict { REFUSED = -1, FOREIGN = 0, OURS = 1, HALF = 2 };

static struct {
    char folder[PATH_MAX];
    size_t length;
    enum mode mode;
    long count, from, to, refused; /* calls number from <= n < to are hit */
    int error, log;
} watch = {.log = -1};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static ssize_t plain_write(int fd, const void *bytes, size_t size) {
    static __typeof__(&write) next;
    if (!next) next = (__typeof__(&write))dlsym(RTLD_NEXT, "write");
    return next(fd, bytes, size);
}

static int plain_open(const char *path, int flags) {
    static int (*next)(const char *, int, ...);
    if (!next) next = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
    return next(path, flags | O_CLOEXEC, 0644);
}

/* --- for the tests --- */

/* Watch a folder (a real path). Hit the calls number n, counted from 1, up to before `to`; LOG hits them like FAIL. */
int ttl_arm(const char *folder, int mode, long n, long to, int error, const char *log) {
    if (strlen(folder) >= PATH_MAX) return -1;
    strcpy(watch.folder, folder);
    watch.length = strlen(folder);
    watch.count = watch.refused = 0, watch.from = n, watch.to = to, watch.error = error;
    if (mode == LOG && (watch.log = plain_open(log, O_WRONLY | O_CREAT | O_APPEND)) < 0) return -1;
    watch.mode = mode;
    return 0;
}

/* Stop watching; return how many calls were counted. */
long ttl_disarm(void) {
    watch.mode = OFF;
    if (watch.log >= 0) close(watch.log);
    watch.log = -1;
    return watch.count;
}

/* Return how many of them the disk refused. */
long ttl_refused(void) { return watch.refused; }

static void keep(const char *what, const char *path, const char *other, long long offset, long long size) {
    char line[2 * PATH_MAX + 100];
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\t%lld\t%lld\n", what, path, other ? other : "", offset, size);
    if (plain_write(watch.log, line, length) != length) abort();
}

/* Put a word of the test's own into the log. */
void ttl_note(const char *word) {
    pthread_mutex_lock(&lock);
    if (watch.mode == LOG) keep("note", word, NULL, 0, 0);
    pthread_mutex_unlock(&lock);
}

/* --- before and after a call --- */

static const char *absolute(char *full, int directory, const char *path) {
    char base[PATH_MAX] = "";
    if (watch.mode == OFF) return "";
    if (path && path[0] == '/') {
        snprintf(full, PATH_MAX, "%s", path);
        return full;
    }
    if (directory == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return "";
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0) return "";
        base[length] = 0;
    }
    if (path) {
        size_t used = strlen(base);
        snprintf(base + used, sizeof base - used, "/%s", path);
    }
    memcpy(full, base, sizeof base);
    return full;
}

static int watched(const char *path) {
    return watch.mode != OFF && !strncmp(path, watch.folder, watch.length)
        && (path[watch.length] == '/' || !path[watch.length]);
}

/* A full disk still frees what is on it. */
static int refuses(enum kind kind) {
    return (watch.error != ENOSPC && watch.error != EDQUOT) || (kind != FREE && kind != CHANGE);
}

/* OURS keeps the lock until after(). */
static enum verdict before(enum kind kind, const char *path) {
    if (!watched(path)) return FOREIGN;
    if (watch.mode == TORN && kind != WRITE) return FOREIGN;
    pthread_mutex_lock(&lock);
    long n = ++watch.count;
    if (n >= watch.from && n < watch.to) {
        if (watch.mode == KILL) kill(getpid(), SIGKILL), pause();
        if (watch.mode == TORN || (watch.mode == SHORT && n == watch.from && kind == WRITE)) return HALF;
        if (watch.mode != COUNT && refuses(kind)) {
            watch.refused++;
            pthread_mutex_unlock(&lock);
            errno = watch.error;
            return REFUSED;
        }
    }
    return OURS;
}

static void after(int done, const char *what, const char *path, const char *other) {
    int saved = errno;
    if (done && watch.mode == LOG) keep(what, path, other, 0, 0);
    pthread_mutex_unlock(&lock);
    errno = saved;
}

/* The bytes that a write has left in the file are read back from there. */
static void after_write(enum verdict verdict, ssize_t written, int fd, const char *path, off_t offset) {
    int saved = errno;
    if (watch.mode == TORN && verdict == HALF) kill(getpid(), SIGKILL), pause();
    if (watch.mode == LOG && written > 0 && !strstr(path, " (deleted)")) {
        char link[64], *bytes = malloc(written);
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        int again = plain_open(link, O_RDONLY);
        if (again < 0 || pread(again, bytes, written, offset) != written) abort();
        close(again);
        keep("write", path, NULL, offset, written);
        if (plain_write(watch.log, bytes, written) != written) abort();
        free(bytes);
    }
    pthread_mutex_unlock(&lock);
    errno = saved;
}

static off_t position(int fd) {
    struct stat status;
    if (watch.mode != LOG) return 0;
    if (fcntl(fd, F_GETFL) & O_APPEND) return fstat(fd, &status) ? 0 : status.st_size;
    return lseek(fd, 0, SEEK_CUR);
}

static void after_size(int done, const char *path, off_t size) {
    int saved = errno;
    if (done && watch.mode == LOG) keep("truncate", path, NULL, 0, size);
    pthread_mutex_unlock(&lock);
    errno = saved;
}

/* --- the calls --- */

static int opened(int (*next)(int, const char *, int, mode_t), int directory, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    struct stat status;
    if (!(flags & (O_CREAT | O_TRUNC)) || (flags & O_TMPFILE) == O_TMPFILE) return next(directory, path, flags, mode);
    enum verdict verdict = before(CREATE, absolute(full, directory, path));
    if (verdict == REFUSED) return -1;
    int there = verdict == OURS && !lstat(full, &status);
    int fd = next(directory, path, flags, mode);
    if (verdict == OURS && there) after_size(fd >= 0 && (flags & O_TRUNC), full, 0);
    else if (verdict == OURS) after(fd >= 0, "create", full, NULL);
    return fd;
}

static int next_openat(int directory, const char *path, int flags, mode_t mode) {
    static int (*next)(int, const char *, int, ...);
    if (!next) next = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat64");
    return next(directory, path, flags, mode);
}

#define WITH_MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | __O_TMPFILE)) { \
    va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
#define OPEN(name) int name(const char *path, int flags, ...) { \
    WITH_MODE(flags) return opened(next_openat, AT_FDCWD, path, flags, mode); }
#define OPENAT(name) int name(int directory, const char *path, int flags, ...) { \
    WITH_MODE(flags) return opened(next_openat, directory, path, flags, mode); }
#define CREAT(name) int name(const char *path, mode_t mode) { \
    return opened(next_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64) CREAT(creat) CREAT(creat64)
int __open_2(const char *path, int flags) { return opened(next_openat, AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return opened(next_openat, AT_FDCWD, path, flags, 0); }
int __openat_2(int directory, const char *path, int flags) { return opened(next_openat, directory, path, flags, 0); }
int __openat64_2(int directory, const char *path, int flags) { return opened(next_openat, directory, path, flags, 0); }

/* `whole` and `half` make the call; offset < 0: where the file stands. */
#define WRITING(fd, offset, whole, half) \
    char full[PATH_MAX]; \
    enum verdict verdict = before(WRITE, absolute(full, fd, NULL)); \
    if (verdict == REFUSED) return -1; \
    if (verdict == FOREIGN) return whole; \
    off_t start = (offset) < 0 ? position(fd) : (offset); \
    ssize_t written = verdict == HALF ? half : whole; \
    after_write(verdict, written, fd, full, start); \
    return written

ssize_t write(int fd, const void *bytes, size_t size) {
    NEXT(write);
    WRITING(fd, -1, next(fd, bytes, size), next(fd, bytes, size / 2));
}

#define PWRITE(name) ssize_t name(int fd, const void *bytes, size_t size, off_t offset) { \
    NEXT(name); WRITING(fd, offset, next(fd, bytes, size, offset), next(fd, bytes, size / 2, offset)); }
PWRITE(pwrite) PWRITE(pwrite64)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    NEXT(writev);
    WRITING(fd, -1, next(fd, parts, count), plain_write(fd, parts[0].iov_base, parts[0].iov_len / 2));
}

#define PWRITEV(name) ssize_t name(int fd, const struct iovec *parts, int count, off_t offset) { NEXT(name); \
    WRITING(fd, offset, next(fd, parts, count, offset), pwrite(fd, parts[0].iov_base, parts[0].iov_len / 2, offset)); }
PWRITEV(pwritev) PWRITEV(pwritev64)

#define PWRITEV2(name) ssize_t name(int fd, const struct iovec *parts, int count, off_t offset, int flags) { NEXT(name); \
    WRITING(fd, offset, next(fd, parts, count, offset, flags), \
            pwrite(fd, parts[0].iov_base, parts[0].iov_len / 2, offset)); }
PWRITEV2(pwritev2) PWRITEV2(pwritev64v2)

#define SENDFILE(name) ssize_t name(int fd, int source, off_t *from, size_t size) { \
    NEXT(name); WRITING(fd, -1, next(fd, source, from, size), next(fd, source, from, (size + 1) / 2)); }
SENDFILE(sendfile) SENDFILE(sendfile64)

ssize_t copy_file_range(int source, off_t *from, int fd, off_t *to, size_t size, unsigned flags) {
    NEXT(copy_file_range);
    WRITING(fd, to ? *to : -1, next(source, from, fd, to, size, flags), next(source, from, fd, to, size / 2, flags));
}

#define ON_FILE(kind, what, name, type, declared, given) int name declared { \
    NEXT(name); char full[PATH_MAX]; \
    enum verdict verdict = before(kind, absolute(full, type)); \
    if (verdict == REFUSED) return -1; \
    int result = next given; \
    if (verdict == OURS) after(!result, what, full, NULL); \
    return result; }
#define FD fd, NULL
#define PATH AT_FDCWD, path
#define AT directory, path
ON_FILE(SYNC, "fsync", fsync, FD, (int fd), (fd))
ON_FILE(SYNC, "fsync", fdatasync, FD, (int fd), (fd))
ON_FILE(SYNC, "syncfs", syncfs, FD, (int fd), (fd))
ON_FILE(MAKE, "mkdir", mkdir, PATH, (const char *path, mode_t mode), (path, mode))
ON_FILE(MAKE, "mkdir", mkdirat, AT, (int directory, const char *path, mode_t mode), (directory, path, mode))
ON_FILE(FREE, "unlink", unlink, PATH, (const char *path), (path))
ON_FILE(FREE, "unlink", remove, PATH, (const char *path), (path))
ON_FILE(FREE, "unlink", rmdir, PATH, (const char *path), (path))
ON_FILE(FREE, "unlink", unlinkat, AT, (int directory, const char *path, int flags), (directory, path, flags))
ON_FILE(MAKE, "symlink", symlink, PATH, (const char *to, const char *path), (to, path))
ON_FILE(MAKE, "symlink", symlinkat, AT, (const char *to, int directory, const char *path), (to, directory, path))
ON_FILE(CHANGE, "change", chmod, PATH, (const char *path, mode_t mode), (path, mode))
ON_FILE(CHANGE, "change", fchmod, FD, (int fd, mode_t mode), (fd, mode))
ON_FILE(CHANGE, "change", fchmodat, AT, (int directory, const char *path, mode_t mode, int flags),
        (directory, path, mode, flags))
ON_FILE(CHANGE, "change", utimensat, AT, (int directory, const char *path, const struct timespec times[2], int flags),
        (directory, path, times, flags))
ON_FILE(CHANGE, "change", futimens, FD, (int fd, const struct timespec times[2]), (fd, times))

#define SIZE(name, type, declared, given) int name declared { \
    NEXT(name); char full[PATH_MAX]; \
    enum verdict verdict = before(WRITE, absolute(full, type)); \
    if (verdict == REFUSED) return -1; \
    int result = next given; \
    if (verdict == HALF && watch.mode == TORN) kill(getpid(), SIGKILL), pause(); \
    if (verdict != FOREIGN) after_size(!result, full, size); \
    return result; }
SIZE(truncate, PATH, (const char *path, off_t size), (path, size))
SIZE(truncate64, PATH, (const char *path, off_t size), (path, size))
SIZE(ftruncate, FD, (int fd, off_t size), (fd, size))
SIZE(ftruncate64, FD, (int fd, off_t size), (fd, size))

static int moved(const char *what, enum kind kind, int from_directory, const char *from, int to_directory,
                 const char *to, int (*call)(int, const char *, int, const char *, unsigned), unsigned flags) {
    char old[PATH_MAX], new[PATH_MAX];
    const char *first = absolute(old, from_directory, from), *second = absolute(new, to_directory, to);
    enum verdict verdict = before(kind, watched(first) ? first : second);
    if (verdict == REFUSED) return -1;
    int result = call(from_directory, from, to_directory, to, flags);
    if (verdict == OURS) after(!result, what, old, new);
    return result;
}

static int next_rename(int a, const char *from, int b, const char *to, unsigned flags) {
    static __typeof__(&renameat2) next;
    if (!next) next = (__typeof__(&renameat2))dlsym(RTLD_NEXT, "renameat2");
    return next(a, from, b, to, flags);
}

static int next_link(int a, const char *from, int b, const char *to, unsigned flags) {
    static __typeof__(&linkat) next;
    if (!next) next = (__typeof__(&linkat))dlsym(RTLD_NEXT, "linkat");
    return next(a, from, b, to, flags);
}

int rename(const char *from, const char *to) {
    return moved("rename", RENAME, AT_FDCWD, from, AT_FDCWD, to, next_rename, 0);
}
int renameat(int a, const char *from, int b, const char *to) {
    return moved("rename", RENAME, a, from, b, to, next_rename, 0);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    return moved("rename", RENAME, a, from, b, to, next_rename, flags);
}
int link(const char *from, const char *to) { return moved("link", MAKE, AT_FDCWD, from, AT_FDCWD, to, next_link, 0); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
    return moved("link", MAKE, a, from, b, to, next_link, flags);
}
