/* wire.c: the syntax of what comes over the wire, HTTP/1.1 and JSON. MIT licence.
 *
 * A worker must take every well-formed request, however it is cut into packets, and refuse every
 * malformed one in the same way, since proxies that disagree with a server about where a request
 * ends are how requests get smuggled. The JSON part sends the public conformance files, if
 * LORCH_SHARED names the directory that holds testdata/json. */
#include "harness.h"

#include <dirent.h>
#include <sys/resource.h>

static worker *shared_worker;

static int shared(void) {
    if (shared_worker && worker_gone(shared_worker)) {
        CHECK(false, "the worker ended with %d", shared_worker->status);
        worker_drop(shared_worker);
        shared_worker = NULL;
    }
    if (!shared_worker) shared_worker = ready_worker("--model", tiny_model());
    return shared_worker->port;
}

#define HOST "Host: 127.0.0.1\r\n"
#define JSON_TYPE "Content-Type: application/json\r\n"
#define LIVE "GET /livez HTTP/1.1\r\n"
#define CANCEL "POST /cancel HTTP/1.1\r\n" HOST JSON_TYPE
#define BODY "{\"job_id\":\"wire\"}" /* 17 bytes */

/* ==== What is refused, what is taken ========================================================== */

/* A request, the status it gets, and whether the connection must be closed after it. */
typedef struct { const char *name, *bytes; size_t n; int status; bool closed; } wire_row;
#define ROW(name, literal, status, closed) {name, literal, sizeof literal - 1, status, closed}

static const wire_row head_rows[] = {
    ROW("a plain request", LIVE HOST "\r\n", 200, false),
    ROW("any capitals in names", LIVE "hOsT: localhost\r\n\r\n", 200, false),
    ROW("no space after a colon", LIVE "Host:localhost\r\n\r\n", 200, false),
    ROW("spaces and tabs around a value", LIVE "Host: \t localhost \t \r\n\r\n", 200, false),
    ROW("a tab within a value", LIVE HOST "X: a\tb\r\n\r\n", 200, false),
    ROW("bytes over 127 in a value", LIVE HOST "X: \xc3\xa9\r\n\r\n", 200, false),
    ROW("an empty value", LIVE HOST "X:\r\n\r\n", 200, false),
    ROW("a query", "GET /livez?a=b HTTP/1.1\r\n" HOST "\r\n", 200, false),
    ROW("absolute form", "GET http://127.0.0.1/livez HTTP/1.1\r\n" HOST "\r\n", 200, false),
    ROW("an empty line before the request", "\r\n" LIVE HOST "\r\n", 200, false),
    ROW("line feeds only", "GET /livez HTTP/1.1\nHost: localhost\n\n", 400, true),
    ROW("a bare line feed after a header", LIVE "Host: localhost\n\r\n", 400, true),
    ROW("a bare carriage return in a value", LIVE HOST "X: a\rb\r\n\r\n", 400, true),
    ROW("a space before the colon", LIVE "Host : localhost\r\n\r\n", 400, true),
    ROW("a folded line", LIVE HOST "X: a\r\n b\r\n\r\n", 400, true),
    ROW("a folded first line", LIVE " X: a\r\n" HOST "\r\n", 400, true),
    ROW("an empty name", LIVE HOST ": a\r\n\r\n", 400, true),
    ROW("a bracket in a name", LIVE HOST "X(: a\r\n\r\n", 400, true),
    ROW("a letter over 127 in a name", LIVE HOST "X\xc3\xa9: a\r\n\r\n", 400, true),
    ROW("a header without a colon", LIVE HOST "nonsense\r\n\r\n", 400, true),
    ROW("a control character in a value", LIVE HOST "X: a\001b\r\n\r\n", 400, true),
    ROW("DEL in a value", LIVE HOST "X: a\177b\r\n\r\n", 400, true),
    ROW("NUL in a value", LIVE HOST "X: a\0b\r\n\r\n", 400, true),
    ROW("NUL in the target", "GET /livez\0 HTTP/1.1\r\n" HOST "\r\n", 400, true),
    ROW("no Host", LIVE "\r\n", 400, true),
    ROW("two Hosts", LIVE HOST HOST "\r\n", 400, true),
    ROW("an empty Host", LIVE "Host:\r\n\r\n", 400, true),
    ROW("a space in Host", LIVE "Host: local host\r\n\r\n", 400, true),
    ROW("a path in Host", LIVE "Host: localhost/x\r\n\r\n", 400, true),
    ROW("a bad port in Host", LIVE "Host: localhost:8x\r\n\r\n", 400, true),
    ROW("a user in Host", LIVE "Host: a@localhost\r\n\r\n", 400, true),
    ROW("HTTP/2.0", "GET /livez HTTP/2.0\r\n" HOST "\r\n", 505, true),
    ROW("HTTP/1.2", "GET /livez HTTP/1.2\r\n" HOST "\r\n", 505, true),
    ROW("HTTP/0.9", "GET /livez HTTP/0.9\r\n" HOST "\r\n", 505, true),
    ROW("http in small letters", "GET /livez http/1.1\r\n" HOST "\r\n", 400, true),
    ROW("no version", "GET /livez\r\n" HOST "\r\n", 400, true),
    ROW("a half version", "GET /livez HTTP/1\r\n" HOST "\r\n", 400, true),
    ROW("two spaces", "GET  /livez HTTP/1.1\r\n" HOST "\r\n", 400, true),
    ROW("a tab for a space", "GET\t/livez HTTP/1.1\r\n" HOST "\r\n", 400, true),
    ROW("a space at the end of the line", "GET /livez HTTP/1.1 \r\n" HOST "\r\n", 400, true),
    ROW("a leading space", " GET /livez HTTP/1.1\r\n" HOST "\r\n", 400, true),
    ROW("a method that is no token", "G{T /livez HTTP/1.1\r\n" HOST "\r\n", 400, true),
    ROW("a relative target", "GET livez HTTP/1.1\r\n" HOST "\r\n", 400, true),
    ROW("a control character in the target", "GET /li\001vez HTTP/1.1\r\n" HOST "\r\n", 400, true),
    ROW("TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, true),
    ROW("an unknown method", "BREW /livez HTTP/1.1\r\n" HOST "\r\n", 501, false),
    ROW("a method in small letters", "get /livez HTTP/1.1\r\n" HOST "\r\n", 501, false),
    ROW("an unknown path", "GET /nowhere HTTP/1.1\r\n" HOST "\r\n", 404, false),
    ROW("the root", "GET / HTTP/1.1\r\n" HOST "\r\n", 404, false),
    ROW("a longer path", "GET /livez/x HTTP/1.1\r\n" HOST "\r\n", 404, false),
};

static const wire_row body_rows[] = {
    ROW("a body", CANCEL "Content-Length: 17\r\n\r\n" BODY, 202, false),
    ROW("leading zeros", CANCEL "Content-Length: 0017\r\n\r\n" BODY, 202, false),
    ROW("+17", CANCEL "Content-Length: +17\r\n\r\n" BODY, 400, true),
    ROW("-17", CANCEL "Content-Length: -17\r\n\r\n" BODY, 400, true),
    ROW("17,17", CANCEL "Content-Length: 17, 17\r\n\r\n" BODY, 400, true),
    ROW("1_7", CANCEL "Content-Length: 1_7\r\n\r\n" BODY, 400, true),
    ROW("0x11", CANCEL "Content-Length: 0x11\r\n\r\n" BODY, 400, true),
    ROW("17.0", CANCEL "Content-Length: 17.0\r\n\r\n" BODY, 400, true),
    ROW("no number", CANCEL "Content-Length: \r\n\r\n" BODY, 400, true),
    ROW("overflow", CANCEL "Content-Length: 18446744073709551633\r\n\r\n" BODY, 400, true),
    ROW("two lengths that differ",
        CANCEL "Content-Length: 17\r\nContent-Length: 18\r\n\r\n" BODY, 400, true),
    ROW("two equal lengths",
        CANCEL "Content-Length: 17\r\nContent-Length: 17\r\n\r\n" BODY, 400, true),
    ROW("no body at all", CANCEL "\r\n", 400, false),
    ROW("OPTIONS with a body that looks like a request",
        "OPTIONS /health HTTP/1.1\r\n" HOST "Content-Length: 40\r\n\r\n"
        "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 204, true),
    ROW("one chunk", CANCEL "Transfer-Encoding: chunked\r\n\r\n11\r\n" BODY "\r\n0\r\n\r\n", 202,
        false),
    ROW("CHUNKED", CANCEL "Transfer-Encoding: Chunked\r\n\r\n11\r\n" BODY "\r\n0\r\n\r\n", 202,
        false),
    ROW("two chunks",
        CANCEL "Transfer-Encoding: chunked\r\n\r\nA\r\n{\"job_id\":\r\n"
        "7\r\n\"wire\"}\r\n000\r\n\r\n", 202, false),
    ROW("a chunk extension",
        CANCEL "Transfer-Encoding: chunked\r\n\r\n11;a=\"b\"\r\n" BODY "\r\n0;x\r\n\r\n", 202,
        false),
    ROW("trailers",
        CANCEL "Transfer-Encoding: chunked\r\n\r\n11\r\n" BODY "\r\n0\r\nX: y\r\n\r\n", 202,
        false),
    ROW("chunked and a length",
        CANCEL "Transfer-Encoding: chunked\r\nContent-Length: 17\r\n\r\n11\r\n" BODY
        "\r\n0\r\n\r\n", 400, true),
    ROW("gzip", CANCEL "Transfer-Encoding: gzip\r\n\r\n" BODY, 400, true),
    ROW("identity", CANCEL "Transfer-Encoding: identity\r\n\r\n" BODY, 400, true),
    ROW("gzip, chunked",
        CANCEL "Transfer-Encoding: gzip, chunked\r\n\r\n11\r\n" BODY "\r\n0\r\n\r\n", 400, true),
    ROW("chunked twice",
        CANCEL "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n11\r\n" BODY
        "\r\n0\r\n\r\n", 400, true),
    ROW("xchunked", CANCEL "Transfer-Encoding: xchunked\r\n\r\n11\r\n" BODY "\r\n0\r\n\r\n", 400,
        true),
    ROW("chunked in HTTP/1.0",
        "POST /cancel HTTP/1.0\r\n" HOST JSON_TYPE "Transfer-Encoding: chunked\r\n\r\n11\r\n" BODY
        "\r\n0\r\n\r\n", 400, true),
    ROW("a chunk of 0x11",
        CANCEL "Transfer-Encoding: chunked\r\n\r\n0x11\r\n" BODY "\r\n0\r\n\r\n", 400, true),
    ROW("a chunk of +11",
        CANCEL "Transfer-Encoding: chunked\r\n\r\n+11\r\n" BODY "\r\n0\r\n\r\n", 400, true),
    ROW("a chunk of -1",
        CANCEL "Transfer-Encoding: chunked\r\n\r\n-1\r\n" BODY "\r\n0\r\n\r\n", 400, true),
    ROW("a chunk of 1_1",
        CANCEL "Transfer-Encoding: chunked\r\n\r\n1_1\r\n" BODY "\r\n0\r\n\r\n", 400, true),
    ROW("a chunk without a size",
        CANCEL "Transfer-Encoding: chunked\r\n\r\n\r\n" BODY "\r\n0\r\n\r\n", 400, true),
    ROW("a space before a size",
        CANCEL "Transfer-Encoding: chunked\r\n\r\n 11\r\n" BODY "\r\n0\r\n\r\n", 400, true),
    ROW("17 digits of size",
        CANCEL "Transfer-Encoding: chunked\r\n\r\n00000000000000011\r\n" BODY "\r\n0\r\n\r\n", 400,
        true),
    ROW("a size that overflows",
        CANCEL "Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" BODY "\r\n0\r\n\r\n", 413,
        true),
    ROW("a bare line feed after a size",
        CANCEL "Transfer-Encoding: chunked\r\n\r\n11\n" BODY "\r\n0\r\n\r\n", 400, true),
    ROW("a bare line feed after a chunk",
        CANCEL "Transfer-Encoding: chunked\r\n\r\n11\r\n" BODY "\n0\r\n\r\n", 400, true),
    ROW("a chunk longer than its size",
        CANCEL "Transfer-Encoding: chunked\r\n\r\n10\r\n" BODY "\r\n0\r\n\r\n", 400, true),
    ROW("a NUL in a chunk extension",
        CANCEL "Transfer-Encoding: chunked\r\n\r\n11;\0\r\n" BODY "\r\n0\r\n\r\n", 400, true),
    ROW("a malformed trailer",
        CANCEL "Transfer-Encoding: chunked\r\n\r\n11\r\n" BODY "\r\n0\r\nX : y\r\n\r\n", 400, true),
};

static const char *code_of(int status) {
    static const struct { int status; const char *code; } rows[] = {
        {400, "INVALID_REQUEST"}, {404, "NOT_FOUND"}, {405, "METHOD_NOT_ALLOWED"},
        {408, "REQUEST_TIMEOUT"}, {413, "PAYLOAD_TOO_LARGE"}, {431, "HEADERS_TOO_LARGE"},
        {501, "NOT_IMPLEMENTED"}, {505, "HTTP_VERSION"},
    };
    for (size_t i = 0; i < COUNT(rows); i++)
        if (rows[i].status == status) return rows[i].code;
    return "(none)";
}

static void check_reply(const reply *r, int status, const char *name) {
    CHECK(r->status == status, "%s: status %d, not %d", name, r->status, status);
    if (r->status != status || status < 400) return;
    CHECK(!strcmp(json_str(r->body.p, "error.code"), code_of(status)), "%s: %s", name, r->body.p);
}

/* Sends a row in pieces of `piece` bytes (0: whole) and a second request behind it, which must be
 * answered exactly if the first one left the connection usable. */
static void check_row(const wire_row *row, size_t piece) {
    static const char again[] = "GET /health HTTP/1.1\r\n" HOST "\r\n";
    conn *c = conn_open(shared());
    if (!piece) piece = row->n;
    for (size_t at = 0; at < row->n; at += piece)
        if (!conn_send(c, row->bytes + at, row->n - at < piece ? row->n - at : piece)) break;
    conn_send(c, again, sizeof again - 1);
    reply *r = reply_read(c);
    check_reply(r, row->status, row->name);
    if (row->closed) {
        CHECK(conn_closed(c, bound_ms(2000)), "%s: the connection stays open", row->name);
        CHECK(header_is(r, "Connection", "close"), "%s: no Connection: close", row->name);
    } else
        CHECK(reply_read(c)->status == 200, "%s: the connection is lost", row->name);
    conn_close(c);
}

static void check_rows(const wire_row *rows, size_t n, size_t piece) {
    for (size_t i = 0; i < n; i++) check_row(&rows[i], piece);
}

static void test_heads(void) { check_rows(head_rows, COUNT(head_rows), 0); }
static void test_bodies(void) { check_rows(body_rows, COUNT(body_rows), 0); }

static void test_bytewise(void) {
    check_rows(head_rows, COUNT(head_rows), 1);
    check_rows(body_rows, COUNT(body_rows), 1);
}

/* ==== Splitting, pipelining, connections ====================================================== */

/* What a reply says, without what differs from one to the next. */
static char *essence(const reply *r) {
    buf b = {0};
    buf_room(&b, 1);
    for (const char *line = r->head; *line; ) {
        size_t n = strcspn(line, "\n") + 1;
        if (strncasecmp(line, "Date:", 5)) buf_add(&b, line, n);
        line += n;
    }
    buf_str(&b, r->body.p);
    return b.p;
}

static void split_everywhere(const char *bytes, int status) {
    size_t n = strlen(bytes);
    char *want = essence(http_bytes(shared(), bytes, n));
    for (size_t at = 1; at < n; at++) {
        conn *c = conn_open(shared());
        conn_send(c, bytes, at);
        nap_ms(1); /* So that the worker meets the first part alone. */
        conn_send(c, bytes + at, n - at);
        reply *r = reply_read(c);
        CHECK(r->status == status, "split at %zu: status %d", at, r->status);
        CHECK_TEXT(essence(r), want, text("split at %zu", at));
        conn_close(c);
    }
}

static void test_split(void) {
    split_everywhere(CANCEL "X-Correlation-Id: split\r\nContent-Length: 17\r\n\r\n" BODY, 202);
    split_everywhere(CANCEL "X-Correlation-Id: split\r\nTransfer-Encoding: chunked\r\n\r\n"
                     "B;x=y\r\n{\"job_id\":\"\r\n6\r\nwire\"}\r\n0\r\nT: u\r\n\r\n", 202);
    split_everywhere(LIVE HOST "X-Correlation-Id: split\r\nX : y\r\n\r\n", 400);
}

static void test_pipelining(void) {
    buf b = {0};
    conn *c = conn_open(shared());
    for (int i = 0; i < 50; i++) {
        char *body = text("{\"job_id\":\"pipe-%d\"}", i);
        buf_str(&b, i % 5 ? request(shared(), "POST", "/cancel", "", body)
                          : request(shared(), "GET", "/nowhere", "", NULL));
    }
    conn_send(c, b.p, b.n);
    for (int i = 0; i < 50; i++) {
        reply *r = reply_read(c);
        CHECK(r->status == (i % 5 ? 202 : 404), "reply %d: status %d", i, r->status);
        if (i % 5) CHECK_TEXT(json_str(r->body.p, "job_id"), text("pipe-%d", i), "job_id");
    }
}

/* A stream occupies its connection; what was pipelined before it is answered before it. */
static void test_pipelined_execute(void) {
    conn *c = conn_open(shared());
    char *job = job_body("\"max_tokens\":2");
    conn_text(c, text("%s%s", request(shared(), "GET", "/livez", "", NULL),
                      request(shared(), "POST", "/execute", "", job)));
    CHECK_NUM(reply_read(c)->status, 200, "/livez");
    reply *r = reply_read(c);
    CHECK_NUM(r->status, 200, "/execute");
    CHECK(r->done && strstr(r->body.p, "\"end\""), "no end: %s", r->body.p);
}

static void test_keep_alive(void) {
    static const struct { const char *version, *header; bool kept; } rows[] = {
        {"1.1", "", true}, {"1.1", "Connection: keep-alive\r\n", true},
        {"1.1", "Connection: close\r\n", false}, {"1.1", "Connection: x, Close\r\n", false},
        {"1.0", "", false}, {"1.0", "Connection: close\r\n", false},
        {"1.0", "Connection: Keep-Alive\r\n", true},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        const char *name = text("HTTP/%s %s", rows[i].version, rows[i].header);
        char *bytes = text("GET /livez HTTP/%s\r\n" HOST "%s\r\n", rows[i].version, rows[i].header);
        conn *c = conn_open(shared());
        conn_text(c, bytes);
        reply *r = reply_read(c);
        CHECK(r->status == 200 && r->done, "%s: status %d", name, r->status);
        if (rows[i].kept) {
            /* A 1.0 client that asked for it must be told that its wish was granted. */
            if (rows[i].version[2] == '0')
                CHECK(header_is(r, "Connection", "keep-alive"), "%s: %s", name, r->head);
            conn_text(c, bytes);
            CHECK(reply_read(c)->status == 200, "%s: not kept", name);
        } else
            CHECK(conn_closed(c, bound_ms(1000)), "%s: not closed", name);
    }
}

static void test_http10(void) {
    char *body = job_body("\"max_tokens\":3");
    char *bytes = text("POST /execute HTTP/1.0\r\n" HOST JSON_TYPE "Content-Length: %zu\r\n\r\n%s",
                       strlen(body), body);
    reply *r = http_bytes(shared(), bytes, strlen(bytes));
    CHECK_NUM(r->status, 200, "status");
    CHECK(!reply_header(r, "Transfer-Encoding"), "chunked for HTTP/1.0: %s", r->head);
    CHECK(r->kind == BODY_CLOSE && r->done, "the body does not end with the connection");
    CHECK(strstr(r->body.p, "\"type\":\"end\""), "no end: %s", r->body.p);
    r = http_bytes(shared(), "GET /livez HTTP/1.0\r\n\r\n", 23);
    CHECK(r->status == 200 || r->status == 400, "HTTP/1.0 without Host: %d", r->status);
}

static void test_head(void) {
    static const char *const targets[] = {"/health", "/livez", "/readyz", "/metrics"};
    conn *c = conn_open(shared());
    for (size_t i = 0; i < COUNT(targets); i++) {
        conn_text(c, request(shared(), "HEAD", targets[i], "", NULL));
        reply *r = reply_read_as(c, true, bound_ms(2000));
        CHECK(r->status == 200, "HEAD %s: %d", targets[i], r->status);
        CHECK(reply_header(r, "Content-Length"), "HEAD %s: no length", targets[i]);
    }
    CHECK(!conn_fill(c, 50), "HEAD has a body: %s", c->in.p + c->used);
}

static void test_methods(void) {
    static const struct { const char *target, *allowed; } rows[] = {
        {"/execute", "POST"}, {"/cancel", "POST"}, {"/cancel/x", "POST"}, {"/shutdown", "POST"},
        {"/health", "GET"}, {"/livez", "GET"}, {"/readyz", "GET"}, {"/metrics", "GET"},
    };
    static const char *const methods[] = {"GET", "POST", "PUT", "DELETE", "PATCH"};
    for (size_t i = 0; i < COUNT(rows); i++) {
        for (size_t m = 0; m < COUNT(methods); m++) {
            if (!strcmp(methods[m], rows[i].allowed)) continue;
            reply *r = http(shared(), methods[m], rows[i].target, "", NULL);
            check_reply(r, 405, text("%s %s", methods[m], rows[i].target));
            const char *allow = reply_header(r, "Allow");
            CHECK(allow && strstr(allow, rows[i].allowed), "Allow: %s", allow ? allow : "(none)");
        }
        reply *r = http(shared(), "OPTIONS", rows[i].target, "", NULL);
        const char *allow = reply_header(r, "Allow");
        CHECK(r->status == 200 || r->status == 204 || r->status == 405, "OPTIONS: %d", r->status);
        CHECK(allow && strstr(allow, rows[i].allowed), "OPTIONS, Allow: %s", allow ? allow : "");
    }
}

/* Some clients wait for 100 Continue before they send a body. */
static void test_expect(void) {
    conn *c = conn_open(shared());
    conn_text(c, CANCEL "Expect: 100-continue\r\nContent-Length: 17\r\n\r\n");
    CHECK(conn_fill(c, bound_ms(2000)), "no interim reply");
    CHECK(!strncmp(c->in.p, "HTTP/1.1 100 ", 13), "the interim reply is %s", c->in.p);
    conn_text(c, BODY);
    reply *r = reply_read(c);
    CHECK(r->status == 202 && r->interim == 1, "status %d", r->status);
    /* A request that will be refused need not be sent. */
    c = conn_open(shared());
    conn_text(c, CANCEL "Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n");
    r = reply_read(c);
    CHECK(r->status == 413 && r->interim == 0, "status %d after %d interim", r->status, r->interim);
}

/* ==== Limits ================================================================================== */

/* A request whose head is exactly n bytes long. */
static char *head_of(size_t n) {
    char *most = text_times("x", n);
    return text(LIVE HOST "X: %s\r\n\r\n", most + strlen(LIVE HOST "X: \r\n\r\n"));
}

static void test_head_limit(void) {
    enum { LIMIT = 16 * 1024 };
    char *fits = head_of(LIMIT), *exceeds = head_of(LIMIT + 1), *far = head_of(LIMIT * 8);
    CHECK(strlen(fits) == LIMIT, "the test is wrong");
    check_reply(http_bytes(shared(), fits, LIMIT), 200, "16 KiB");
    check_reply(http_bytes(shared(), exceeds, LIMIT + 1), 431, "one byte more");
    check_reply(http_bytes(shared(), far, strlen(far)), 431, "128 KiB");
    char *target = text("GET /%s HTTP/1.1\r\n" HOST "\r\n", text_times("a", LIMIT));
    check_reply(http_bytes(shared(), target, strlen(target)), 431, "a long target");
}

static void test_header_count(void) {
    char *fits = text(LIVE HOST "%s\r\n", text_times("X: y\r\n", 99));
    char *exceeds = text(LIVE HOST "%s\r\n", text_times("X: y\r\n", 100));
    check_reply(http_bytes(shared(), fits, strlen(fits)), 200, "100 headers");
    check_reply(http_bytes(shared(), exceeds, strlen(exceeds)), 431, "101 headers");
}

static void test_body_limit(void) {
    enum { LIMIT = 1024 * 1024 };
    char *fits = text("{\"job_id\":\"wire\"}%s", text_times(" ", LIMIT - 17));
    char *exceeds = text("%s ", fits), *half = text_times(" ", LIMIT / 2);
    check_reply(post(shared(), "/cancel", fits), 202, "1 MiB");
    check_reply(post(shared(), "/cancel", exceeds), 413, "one byte more");
    check_reply(http(shared(), "POST", "/cancel", "Content-Length: 1048577\r\n", ""), 413,
                "announced only");
    char *chunked = text(CANCEL "Transfer-Encoding: chunked\r\n\r\n11\r\n" BODY
                         "\r\n80000\r\n%s\r\n80000\r\n%s\r\n0\r\n\r\n", half, half);
    check_reply(http_bytes(shared(), chunked, strlen(chunked)), 413, "more in chunks");
    char *fine = text(CANCEL "Transfer-Encoding: chunked\r\n\r\n11\r\n" BODY
                      "\r\n80000\r\n%s\r\n0\r\n\r\n", half);
    check_reply(http_bytes(shared(), fine, strlen(fine)), 202, "half as much in chunks");
}

static void test_chunk_limits(void) {
    char *extension = text(CANCEL "Transfer-Encoding: chunked\r\n\r\n11;%s\r\n" BODY
                           "\r\n0\r\n\r\n", text_times("x", 65536));
    char *trailers = text(CANCEL "Transfer-Encoding: chunked\r\n\r\n11\r\n" BODY "\r\n0\r\n%s\r\n",
                          text_times("X: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n", 2000));
    reply *r = http_bytes(shared(), extension, strlen(extension));
    CHECK(r->status == 400 || r->status == 413 || r->status == 431, "64 KiB of extension: %d",
          r->status);
    r = http_bytes(shared(), trailers, strlen(trailers));
    CHECK(r->status == 400 || r->status == 413 || r->status == 431, "74 KB of trailers: %d",
          r->status);
}

/* Slow clients: a head or a body that does not come gets 408; a connection on which nothing is
 * asked is closed without a word. */
static void test_timeouts(void) {
    worker *w = ready_worker("--model", tiny_model(), "--header-timeout-ms", "200",
                             "--body-timeout-ms", "200", "--idle-timeout-ms", "300");
    conn *head = conn_open(w->port), *body = conn_open(w->port), *idle = conn_open(w->port);
    conn *chunk = conn_open(w->port);
    conn_text(head, "GET /livez HTTP/1.1\r\nHo");
    conn_text(body, CANCEL "Content-Length: 17\r\n\r\n{\"job");
    conn_text(chunk, CANCEL "Transfer-Encoding: chunked\r\n\r\n11\r\n{\"job");
    conn_text(idle, LIVE HOST "\r\n");
    CHECK_NUM(reply_read(idle)->status, 200, "status");
    double asked = now_ms();
    check_reply(reply_read(head), 408, "half a head");
    check_reply(reply_read(body), 408, "half a body");
    check_reply(reply_read(chunk), 408, "half a chunk");
    CHECK(now_ms() - asked > 100, "after %.0f ms", now_ms() - asked);
    CHECK(conn_closed(head, bound_ms(1000)), "the connection stays open after 408");
    CHECK(conn_closed(idle, bound_ms(2000)), "an idle connection is not closed silently");
    /* A trickle of bytes must not keep a request alive for ever. */
    conn *drip = conn_open(w->port);
    asked = now_ms();
    for (int i = 0; i < 100 && !drip->eof; i++) {
        conn_text(drip, i ? "X" : LIVE HOST "X");
        conn_fill(drip, 10);
    }
    CHECK(drip->eof || drip->in.n, "a head may drip for %.0f ms", now_ms() - asked);
    worker_end(w);
}

static void test_many_connections(void) {
    enum { MANY = 300 };
    conn *c[MANY];
    for (int i = 0; i < MANY; i++) {
        c[i] = conn_open(shared());
        conn_text(c[i], "GET /livez HTTP/1.1\r\n");
    }
    CHECK_NUM(get(shared(), "/health")->status, 200, "status with 300 half requests");
    for (int i = 0; i < MANY; i++) conn_text(c[i], HOST "\r\n");
    for (int i = 0; i < MANY; i++) {
        reply *r = reply_read(c[i]);
        CHECK(r->status == 200, "connection %d: status %d", i, r->status);
    }
}

/* A worker that stands still while more clients connect than its listen queue holds (1024): the
 * system takes some at once, and lets the others try again until it goes on. All are served. */
static void test_full_queue(void) {
    enum { MANY = 1400 };
    static conn *c[MANY];
    struct sockaddr_in a = {.sin_family = AF_INET};
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    if (files.rlim_max < MANY + 100) SKIP("not enough descriptors");
    worker *w = ready_worker("--model", tiny_model());
    files.rlim_cur = files.rlim_cur < MANY + 100 ? MANY + 100 : files.rlim_cur;
    setrlimit(RLIMIT_NOFILE, &files);
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK), a.sin_port = htons((uint16_t)w->port);
    kill(w->pid, SIGSTOP);
    int waiting = 0, served = 0;
    for (int i = 0; i < MANY; i++) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        bool begun = connect(fd, (struct sockaddr *)&a, sizeof a) == 0 || errno == EINPROGRESS;
        CHECK(fd >= 0 && begun, "connection %d: %s", i, strerror(errno));
        c[i] = conn_of(fd);
    }
    for (int i = 0; i < MANY; i++) {
        struct pollfd p = {c[i]->fd, POLLOUT, 0};
        waiting += poll(&p, 1, 0) == 0;
    }
    CHECK(waiting > 0, "%d connections fit in the queue", MANY);
    kill(w->pid, SIGCONT);
    CHECK_NUM(get(w->port, "/health")->status, 200, "status of one who comes later");
    double end = now_ms() + bound_ms(20000);
    for (int i = 0; i < MANY; i++) {
        struct pollfd p = {c[i]->fd, POLLOUT, 0};
        int left = (int)(end - now_ms());
        if (poll(&p, 1, left > 0 ? left : 0) > 0) {
            conn_text(c[i], LIVE HOST "Connection: close\r\n\r\n");
            served += reply_read_as(c[i], false, bound_ms(5000))->status == 200;
        }
        conn_close(c[i]);
    }
    CHECK_NUM(served, MANY, "connections served");
    printf("# %d of %d had to wait for a place in the queue\n", waiting, MANY);
    worker_end(w);
}

/* ==== JSON conformance ======================================================================== */

/* Of the files whose name begins with i_, on which parsers may differ, lorch takes all numbers,
 * however large, and refuses lone surrogates, malformed UTF-8, byte order marks and depth. */
static bool json_valid_name(const char *name) {
    return !strncmp(name, "y_", 2) || !strncmp(name, "i_number_", 9);
}

static reply *post_bytes(const char *body, size_t n) {
    buf b = {0};
    buf_str(&b, request(shared(), "POST", "/execute",
                        text(JSON_TYPE "Content-Length: %zu\r\n", n), NULL));
    buf_add(&b, body, n);
    return http_bytes(shared(), b.p, b.n);
}

/* As a body every file is refused, because none is an execute request. The difference between
 * bad JSON and a bad request shows in the list of field errors, which only an object can have. */
static void check_json_body(const char *name, const char *content, size_t n) {
    reply *r = post_bytes(content, n);
    check_reply(r, 400, name);
    const char *first = content + strspn(content, " \t\r\n");
    bool object = json_valid_name(name) && *first == '{';
    CHECK(json_has(r->body.p, "errors") == object, "%s: %s", name, r->body.p);
}

static void check_json_value(const char *name, const char *content, size_t n) {
    buf b = {0};
    buf_print(&b, "{\"job_id\":\"%s\",\"prompt\":\"a\",\"max_tokens\":1,\"x\":", fresh_id());
    buf_add(&b, content, n);
    buf_str(&b, "}");
    reply *r = post_bytes(b.p, b.n);
    int status = json_valid_name(name) ? 200 : 400;
    check_reply(r, status, name);
    if (status == 200) CHECK(strstr(r->body.p, "\"end\""), "%s: %s", name, r->body.p);
}

static void each_json_file(void (*check)(const char *name, const char *content, size_t n)) {
    const char *root = env_or("LORCH_SHARED", NULL);
    if (!root) SKIP("LORCH_SHARED is not set");
    char *path = text("%s/testdata/json", root);
    DIR *dir = opendir(path);
    int files = 0;
    REQUIRE(dir, "no directory %s", path);
    for (struct dirent *e; (e = readdir(dir));) {
        size_t n = 0;
        char *content = NULL;
        if (!strchr("yni", e->d_name[0]) || e->d_name[1] != '_') continue;
        content = text_file(text("%s/%s", path, e->d_name), &n);
        if (!content) continue;
        check(text("%s", e->d_name), content, n);
        files++;
    }
    closedir(dir);
    CHECK(files > 300, "only %d files in %s", files, path);
}

static void test_json_bodies(void) { each_json_file(check_json_body); }
static void test_json_values(void) { each_json_file(check_json_value); }

/* The harness judges lorch's answers with a JSON reader of its own, which is held to the same
 * files. This test needs no worker. */
static void check_own_reader(const char *name, const char *content, size_t n) {
    if (!strncmp(name, "i_structure_500", 15)) return;
    bool valid = json_parse(content, n) != NULL;
    CHECK(valid == json_valid_name(name), "%s: %d", name, valid);
}

static void test_own_reader(void) { each_json_file(check_own_reader); }

static void test_shared_end(void) {
    worker_end(shared_worker);
    shared_worker = NULL;
}

static const test tests[] = {
    {"request lines and headers, whole [SYS-5.5.1]", test_heads},
    {"bodies, whole [SYS-5.5.1]", test_bodies},
    {"the same byte by byte [SYS-5.5.1]", test_bytewise},
    {"split at every byte, a request gets the same reply [SYS-5.4.1]", test_split},
    {"pipelined requests are answered in order [SYS-5.4.1]", test_pipelining},
    {"a stream behind a pipelined request [SYS-5.4.1]", test_pipelined_execute},
    {"connections are kept or closed as asked [SYS-5.4.1]", test_keep_alive},
    {"HTTP/1.0 clients get an unchunked stream [SYS-5.4.1]", test_http10},
    {"HEAD has no body [SYS-6.3.6]", test_head},
    {"other methods get 405 with Allow; OPTIONS [SYS-5.5.1]", test_methods},
    {"Expect: 100-continue [SYS-5.4.1]", test_expect},
    {"a head may have 16 KiB, else 431 [SYS-5.5.1]", test_head_limit},
    {"a head may have 100 headers, else 431 [SYS-5.5.1]", test_header_count},
    {"a body may have 1 MiB, else 413 [SYS-5.5.1]", test_body_limit},
    {"chunk extensions and trailers are limited [SYS-5.5.1]", test_chunk_limits},
    {"slow requests get 408, idle connections end [SYS-5.5.1]", test_timeouts},
    {"300 connections at once [SYS-6.3.8]", test_many_connections},
    {"more connections at once than the listen queue holds [SYS-6.3.8]", test_full_queue},
    {"the harness reads JSON correctly", test_own_reader},
    {"JSON conformance files as bodies [M0-W-1302]", test_json_bodies},
    {"JSON conformance files as values [M0-W-1302]", test_json_values},
    {"the shared worker ends with 0 [SYS-7.2]", test_shared_end},
};

int main(int argc, char **argv) { return tests_main(tests, COUNT(tests), argc, argv); }
