/* load: many streaming completions at once, cheap and exact, to measure what lies between.
 *
 * One thread, epoll, plain sockets. Each read keeps the kernel's receive stamp (SO_TIMESTAMPNS) and
 * its bytes; nothing is parsed before the run is over, but for the end of a reply. Two kinds of load:
 *   hold  -n N: N streams open at all times, begun over -a seconds; a reply that ends is followed by
 *         the next request on the same connection (with 1-token replies: a closed loop of N)
 *   open  -r R: R requests a second, -b at once, on idle connections or, with -f, on new ones
 * It prints "begin" after -w seconds, "end" after -s more (or after -m replies), waits for a line on
 * stdin, then writes PREFIX.events and PREFIX.requests and prints one line of JSON.
 *
 * Events, 32 bytes: kernel stamp, user stamp, srv_ns (all CLOCK_MONOTONIC ns), request u32, index u32.
 * Requests, 40 bytes: begun, sent, last read (0: not ended), status u32, slot u32, new connection u32, 0.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

typedef uint64_t u64;
typedef int64_t i64;
typedef uint32_t u32;

#define MAXSLOT 16384u
#define MAXREQ 4000000u
#define MAXREAD 40000000ull
#define ARENA (24ull << 30)      /* address space, not memory */
#define READ 65536u
#define NONE 0xffffffffu

struct request { u64 begun, sent, ended; u32 status, slot, fresh, pad; };
struct event { u64 kernel, user, srv; u32 req, idx; };
struct reading { u64 kernel, user, off; u32 len, req; };
_Static_assert(sizeof(struct request) == 40 && sizeof(struct event) == 32, "layout");

enum { CLOSED, CONNECTING, IDLE, BUSY };
struct slot { int fd, state; u32 req, out, ntail; char tail[5]; };

static struct slot S[MAXSLOT];
static struct request *Q;
static struct reading *L;
static char *A, *body;
static u64 nL, top, done, failed;
static u32 nQ, nslots, length;
static u32 idle[MAXSLOT], nidle;
static int ep, port = 8080, fresh_each;

static u64 clock_ns(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (u64)t.tv_sec * 1000000000ull + t.tv_nsec;
}
static u64 now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

static i64 wall_minus_monotonic(void)
{
    u64 best = ~0ull;
    i64 found = 0;
    for (int i = 0; i < 100; i++) {
        u64 a = now_ns(), w = clock_ns(CLOCK_REALTIME), b = now_ns();
        if (b - a < best) { best = b - a; found = (i64)(w - (a + b) / 2); }
    }
    return found;
}

static void *vast(size_t n)
{
    void *p = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) { perror("mmap"); exit(1); }
    return p;
}

static void watch(struct slot *s, int op, u32 events)
{
    struct epoll_event e = {.events = events, .data.u32 = (u32)(s - S)};
    epoll_ctl(ep, op, s->fd, &e);
}

static void drop(struct slot *s)
{
    close(s->fd);
    if (s->state == BUSY || s->state == CONNECTING) failed++;
    if (s->state == IDLE)                        /* not to be taken from the idle any more */
        for (u32 i = 0; i < nidle; i++) if (idle[i] == s - S) idle[i--] = idle[--nidle];
    s->state = CLOSED;
}

static void push(struct slot *s)                 /* as much of the request as the socket takes */
{
    struct request *q = &Q[s->req];
    while (s->out < length) {
        ssize_t w = send(s->fd, body + s->out, length - s->out, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (w < 0 && errno == EAGAIN) { watch(s, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT); return; }
        if (w < 0) { drop(s); return; }
        s->out += w;
    }
    q->sent = now_ns();
}

static void ask(struct slot *s, u64 begun, int fresh)
{
    if (nQ == MAXREQ) { fprintf(stderr, "load: too many requests\n"); exit(1); }
    s->req = nQ;
    Q[nQ++] = (struct request){.begun = begun, .slot = (u32)(s - S), .fresh = fresh};
    s->out = s->ntail = 0;
    if (s->state == CONNECTING) return;
    s->state = BUSY;
    push(s);
}

static void dial(struct slot *s)
{
    int one = 1;
    u64 begun = now_ns();
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    s->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (s->fd < 0) { perror("load: socket"); exit(1); }
    setsockopt(s->fd, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof one);
    setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    int r = connect(s->fd, (void *)&a, sizeof a);
    s->state = r ? CONNECTING : IDLE;
    watch(s, EPOLL_CTL_ADD, r ? EPOLLIN | EPOLLOUT : EPOLLIN);
    ask(s, begun, 1);
}

static struct slot *unused(void)
{
    for (u32 i = 0; i < nslots; i++) if (S[i].state == CLOSED) return &S[i];
    if (nslots == MAXSLOT) { fprintf(stderr, "load: too many connections\n"); exit(1); }
    return &S[nslots++];
}

static void ended(struct slot *s, u64 t, int hold, int more)
{
    Q[s->req].ended = t;
    done++;
    s->state = IDLE;
    if (fresh_each) { drop(s); return; }
    if (hold && more) ask(s, now_ns(), 0);
    else if (!hold) idle[nidle++] = (u32)(s - S);
}

static void readable(struct slot *s, int hold, int more, i64 offset)
{
    char control[64];
    struct iovec v = {A + top, READ};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t n = recvmsg(s->fd, &m, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        drop(s);
        if (hold && more && failed < 10000) dial(s);
        return;
    }
    u64 t = now_ns(), kernel = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_TIMESTAMPNS) {
            struct timespec x;
            memcpy(&x, CMSG_DATA(c), sizeof x);
            kernel = (u64)x.tv_sec * 1000000000ull + x.tv_nsec - offset;
        }
    if (nL == MAXREAD || top + n + READ > ARENA) { fprintf(stderr, "load: too much was read\n"); exit(1); }
    L[nL++] = (struct reading){kernel ? kernel : t, t, top, (u32)n, s->req};
    if (!Q[s->req].status) Q[s->req].status = n > 12 ? (u32)atoi(A + top + 9) : 1;
    top += n;
    u32 k = n < 5 ? (u32)n : 5, keep = 5 - k < s->ntail ? 5 - k : s->ntail;
    memmove(s->tail, s->tail + s->ntail - keep, keep);
    memcpy(s->tail + keep, A + top - k, k);
    s->ntail = keep + k;
    if (s->state == BUSY && s->ntail == 5 && !memcmp(s->tail, "0\r\n\r\n", 5)) ended(s, t, hold, more);
}

/* ---- after the run: where srv_ns stands in the bytes of each request; -c: where text does, for a
   target that writes events anew and drops what it does not know (their srv is 0 then) */
#define SPAN 29                                  /* key and its 19 digits */
static const char *KEY = "\"srv_ns\":\"";
static u64 parse(const char *path, i64 drift, u64 t0, u64 t1)
{
    struct carried { u32 n, idx; char b[SPAN]; } *C = vast(sizeof *C * (size_t)(nQ + 1));
    char *b = malloc(READ + SPAN);
    u64 found = 0;
    FILE *f = fopen(path, "w");
    if (!f) { perror(path); exit(1); }
    for (u64 i = 0; i < nL; i++) {
        struct reading *r = &L[i];
        struct carried *c = &C[r->req];
        u32 n = c->n + r->len;
        memcpy(b, c->b, c->n);
        memcpy(b + c->n, A + r->off, r->len);
        char *p = b, *end = b + n;
        u32 key = (u32)strlen(KEY), digits = key == 10 ? 19 : 0, span = key + digits;
        while ((p = memmem(p, end - p, KEY, key)) && p + span <= end) {
            struct event e = {.user = r->user, .req = r->req, .idx = c->idx++};
            e.kernel = r->kernel - (t1 > t0 ? drift * (i64)(r->user - t0) / (i64)(t1 - t0) : 0);
            e.srv = digits ? strtoull(p + key, 0, 10) : 0;
            found += fwrite(&e, sizeof e, 1, f);
            p += span;
        }
        c->n = n < span - 1 ? n : span - 1;      /* too short for a whole one: none is seen twice */
        memcpy(c->b, b + n - c->n, c->n);
    }
    if (fclose(f)) { perror(path); exit(1); }
    return found;
}

static double cpu_s(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return u.ru_utime.tv_sec + u.ru_stime.tv_sec + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static void make_request(u32 tokens, u32 prompt)
{
    char *p = malloc(prompt + 1), *j = malloc(prompt + 400);
    for (u32 i = 0; i < prompt; i++) p[i] = i % 6 ? 'a' + i * 7 % 26 : ' ';
    p[prompt] = 0;
    int n = sprintf(j, "{\"model\":\"m\",\"stream\":true,\"max_tokens\":%u,"
                       "\"messages\":[{\"role\":\"user\",\"content\":\"%s\"}]}", tokens, p);
    body = malloc(n + 400);
    length = sprintf(body, "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                           "Authorization: Bearer sk-bench\r\nContent-Length: %d\r\n\r\n%s", port, n, j);
    free(p); free(j);
}

int main(int ac, char **av)
{
    u32 n = 0, tokens = 100, batch = 1, prompt = 200;
    double rate = 0, window = 5, warm = 1, ramp = 0;
    u64 most = ~0ull;
    const char *prefix = "load";
    for (int o; (o = getopt(ac, av, "p:n:t:r:b:fcs:w:a:m:q:o:")) != -1;) switch (o) {
        case 'p': port = atoi(optarg); break;
        case 'n': n = atoi(optarg); break;
        case 't': tokens = atoi(optarg); break;
        case 'r': rate = atof(optarg); break;
        case 'b': batch = atoi(optarg); break;
        case 'f': fresh_each = 1; break;
        case 'c': KEY = "\"content\":\""; break;
        case 's': window = atof(optarg); break;
        case 'w': warm = atof(optarg); break;
        case 'a': ramp = atof(optarg); break;
        case 'm': most = strtoull(optarg, 0, 10); break;
        case 'q': prompt = atoi(optarg); break;
        case 'o': prefix = optarg; break;
        default: return 2;
    }
    int hold = n > 0;
    prctl(PR_SET_TIMERSLACK, 1);
    make_request(tokens, prompt);
    Q = vast(sizeof *Q * (size_t)(MAXREQ + 1));
    L = vast(sizeof *L * MAXREAD);
    A = vast(ARENA);
    ep = epoll_create1(0);
    i64 offset = wall_minus_monotonic();
    u64 t0 = now_ns(), open_at = t0 + (u64)(warm * 1e9), stop_at = open_at + (u64)(window * 1e9);
    u64 gap = hold ? (u64)(ramp * 1e9) / n : (u64)(1e9 * batch / rate), due = t0, opened = 0;
    double cpu0 = 0;
    u64 reads0 = 0;
    int begun = 0;
    for (;;) {
        u64 t = now_ns();
        if (!begun && t >= open_at) { begun = 1; cpu0 = cpu_s(); reads0 = nL; puts("begin"); fflush(stdout); }
        if (t >= stop_at || done >= most) break;
        for (int k = 0; t >= due && (!hold || opened < n) && k < 64; k++, due += gap) {
            if (hold) { opened++; dial(unused()); continue; }
            for (u32 i = 0; i < batch; i++) {
                if (nidle) ask(&S[idle[--nidle]], now_ns(), 0);
                else dial(unused());
            }
        }
        u64 next = begun ? stop_at : open_at;
        if ((!hold || opened < n) && due < next) next = due;
        t = now_ns();
        u64 d = next > t ? next - t : 0;
        struct timespec ts = {d / 1000000000ull, d % 1000000000ull};
        struct epoll_event ev[256];
        int got = epoll_pwait2(ep, ev, 256, &ts, 0);
        for (int i = 0; i < got; i++) {
            struct slot *s = &S[ev[i].data.u32];
            if (s->state == CLOSED) continue;
            if (ev[i].events & EPOLLOUT) {
                watch(s, EPOLL_CTL_MOD, EPOLLIN);
                if (s->state == CONNECTING && !(ev[i].events & (EPOLLERR | EPOLLHUP))) s->state = BUSY;
                if (s->state == BUSY) push(s);
            }
            if (s->state != CLOSED && ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                readable(s, hold, done + 1 < most, offset);
        }
    }
    u64 t1 = now_ns();
    double cpu = cpu_s() - cpu0;
    u64 reads = nL - reads0;
    puts("end");
    fflush(stdout);
    (void)!getchar();
    i64 drift = wall_minus_monotonic() - offset;
    for (u32 i = 0; i < nslots; i++) if (S[i].state != CLOSED) close(S[i].fd);
    char path[600];
    snprintf(path, sizeof path, "%s.requests", prefix);
    FILE *f = fopen(path, "w");
    if (!f || fwrite(Q, sizeof *Q, nQ, f) != nQ || fclose(f)) { perror(path); return 1; }
    snprintf(path, sizeof path, "%s.events", prefix);
    u64 events = parse(path, drift, t0, t1);
    printf("{\"requests\":%u,\"done\":%llu,\"failed\":%llu,\"reads\":%llu,\"events\":%llu,\"bytes\":%llu,"
           "\"clock_drift_ns\":%lld,\"begin_ns\":%llu,\"end_ns\":%llu,\"cpu_s\":%.4f,\"window_reads\":%llu}\n",
           nQ, (unsigned long long)done, (unsigned long long)failed, (unsigned long long)nL,
           (unsigned long long)events, (unsigned long long)top, (long long)drift,
           (unsigned long long)open_at, (unsigned long long)t1, cpu, (unsigned long long)reads);
    return 0;
}
