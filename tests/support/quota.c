/* A disk quota: after QUOTA_BYTES bytes in files below QUOTA_ROOT, or after QUOTA_FILES files and folders that are made
   there, the system answers EDQUOT. It counts what all processes do that name the same file of counts, QUOTA_COUNTS.

   cc -shared -fPIC -o quota.so quota.c -ldl
   LD_PRELOAD=quota.so QUOTA_ROOT=/store QUOTA_COUNTS=/tmp/counts QUOTA_BYTES=4096 program */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static struct { atomic_long written, made; } own, *counts = &own;

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void share(void) {
    const char *name = getenv("QUOTA_COUNTS");
    int fd = name ? NEXT(open)(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (fd < 0 || ftruncate(fd, sizeof own)) return;
    void *found = mmap(0, sizeof own, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (found != MAP_FAILED) counts = found;
    close(fd);
}

/* How many of these bytes the file may still take: all, some, or -1 with EDQUOT. */
static long allowed(int fd, long wanted) {
    char link[64], path[4096];
    const char *root = getenv("QUOTA_ROOT"), *bytes = getenv("QUOTA_BYTES");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = readlink(link, path, sizeof path - 1);
    if (!root || !bytes || length < 0) return wanted;
    path[length] = 0;
    if (strncmp(path, root, strlen(root)) || wanted <= 0) return wanted;
    long left = atol(bytes) - atomic_load(&counts->written);
    if (left <= 0) {
        errno = EDQUOT;
        return -1;
    }
    return wanted < left ? wanted : left;
}

static long note(int fd, long done) {
    char link[64], path[4096];
    const char *root = getenv("QUOTA_ROOT");
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = readlink(link, path, sizeof path - 1);
    if (length >= 0) path[length] = 0;
    if (done > 0 && length >= 0 && root && !strncmp(path, root, strlen(root))) atomic_fetch_add(&counts->written, done);
    errno = before;
    return done;
}

#define LIMITED(fd, count) \
    long may = allowed(fd, (long)(count)); \
    if (may < 0) return -1

ssize_t write(int fd, const void *data, size_t count) {
    LIMITED(fd, count);
    return note(fd, NEXT(write)(fd, data, may));
}
ssize_t pwrite(int fd, const void *data, size_t count, off_t at) {
    LIMITED(fd, count);
    return note(fd, NEXT(pwrite)(fd, data, may, at));
}
ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) {
    LIMITED(fd, count);
    return note(fd, NEXT(pwrite64)(fd, data, may, at));
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    long whole = 0;
    for (int i = 0; i < count; i++) whole += parts[i].iov_len;
    LIMITED(fd, whole);
    return note(fd, may < whole ? NEXT(write)(fd, parts[0].iov_base, may < (long)parts[0].iov_len ? may : (long)parts[0].iov_len)
                                : NEXT(writev)(fd, parts, count));
}
ssize_t sendfile(int out, int in, off_t *at, size_t count) {
    LIMITED(out, count);
    return note(out, ((ssize_t(*)(int, int, off_t *, size_t))dlsym(RTLD_NEXT, "sendfile"))(out, in, at, may));
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t count) {
    LIMITED(out, count);
    return note(out, ((ssize_t(*)(int, int, off64_t *, size_t))dlsym(RTLD_NEXT, "sendfile64"))(out, in, at, may));
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t count, unsigned int flags) {
    LIMITED(out, count);
    return note(out, NEXT(copy_file_range)(in, from, out, to, may, flags));
}

/* Whether a file or folder may be made; it counts then. One that is there, or is elsewhere, may be. */
static int may_make(int at, const char *name) {
    const char *root = getenv("QUOTA_ROOT"), *files = getenv("QUOTA_FILES");
    char folder[PATH_MAX] = "", path[2 * PATH_MAX];
    int before = errno;
    if (!root || !files || !name || !faccessat(at, name, F_OK, AT_SYMLINK_NOFOLLOW)) {
        errno = before;
        return 1;
    }
    if (*name != '/') {
        char link[64] = "/proc/self/cwd";
        if (at != AT_FDCWD) snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        long length = readlink(link, folder, sizeof folder - 1);
        folder[length < 0 ? 0 : length] = 0;
    }
    snprintf(path, sizeof path, "%s%s%s", folder, *name == '/' ? "" : "/", name);
    errno = before;
    if (strncmp(path, root, strlen(root)) || atomic_fetch_add(&counts->made, 1) < atol(files)) return 1;
    errno = EDQUOT;
    return 0;
}

int mkdir(const char *name, mode_t mode) { return may_make(AT_FDCWD, name) ? NEXT(mkdir)(name, mode) : -1; }
int mkdirat(int at, const char *name, mode_t mode) { return may_make(at, name) ? NEXT(mkdirat)(at, name, mode) : -1; }

#define OPENED(at, name, flags, mode, call) \
    mode_t mode = 0; \
    if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { \
        va_list given; \
        va_start(given, flags); \
        mode = va_arg(given, mode_t); \
        va_end(given); \
    } \
    if (((flags) & O_CREAT) && !may_make(at, name)) return -1; \
    return call

int open(const char *name, int flags, ...) { OPENED(AT_FDCWD, name, flags, mode, NEXT(open)(name, flags, mode)); }
int open64(const char *name, int flags, ...) { OPENED(AT_FDCWD, name, flags, mode, NEXT(open64)(name, flags, mode)); }
int openat(int at, const char *name, int flags, ...) {
    OPENED(at, name, flags, mode, NEXT(openat)(at, name, flags, mode));
}
int openat64(int at, const char *name, int flags, ...) {
    OPENED(at, name, flags, mode, NEXT(openat64)(at, name, flags, mode));
}
