// Without exceptions an error calls the handler, which must not return; without a handler it is printed, then aborts.
// Every case runs in a child process, for every case ends one.
#include <sys/wait.h>
#include <unistd.h>

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include <loramix/core/arena.hpp>
#include <loramix/core/check.hpp>
#include <loramix/core/draws.hpp>
#include <loramix/core/matrix.hpp>
#include <loramix/core/precision.hpp>
#include <loramix/core/team.hpp>
#include <loramix/core/thread_pool.hpp>

#if defined(__cpp_exceptions)
#error "this program proves what happens without exceptions"
#endif

namespace lm = loramix;

namespace {

constexpr int survived = 3;  // the exit status of a child in which nothing stopped the error

struct Outcome {
  int status;
  char text[2048];
};

/// Runs f in a child whose stderr is caught.
template <class F>
Outcome in_child(const F& f) {
  Outcome outcome{};
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    close(ends[0]);
    close(ends[1]);
    f();
    _exit(survived);
  }
  close(ends[1]);
  std::size_t length = 0;
  for (ssize_t n; length + 1 < sizeof outcome.text &&
                  (n = read(ends[0], outcome.text + length, sizeof outcome.text - 1 - length)) > 0;) {
    length += static_cast<std::size_t>(n);
  }
  close(ends[0]);
  waitpid(child, &outcome.status, 0);
  return outcome;
}

bool exited(const Outcome& o, int code) { return WIFEXITED(o.status) && WEXITSTATUS(o.status) == code; }
bool aborted(const Outcome& o) { return WIFSIGNALED(o.status) && WTERMSIG(o.status) == SIGABRT; }

int failures = 0;
void expect(bool good, const char* what, const Outcome& o) {
  std::printf("%s  %s\n", good ? "ok    " : "FAILED", what);
  if (good) return;
  ++failures;
  std::printf("        status %d, stderr: %s\n", o.status, o.text);
}

std::jmp_buf back;
lm::ErrorCode seen_code;
char seen_text[600];

}  // namespace

int main() {
  const lm::MatrixView<float> null(nullptr, 3, 4);

  Outcome o = in_child([&] { lm::check::view("shrink", "x", null); });
  expect(aborted(o) && std::strstr(o.text, "loramix: shrink: x of size [3, 4] has a null address\n") != nullptr,
         "no handler: the message is printed, then abort", o);

  o = in_child([&] {
    lm::set_error_handler([](const lm::Error& error) {
      _exit(error.code() == lm::ErrorCode::null && std::strstr(error.what(), "shrink: x") != nullptr ? 42 : 43);
    });
    lm::check::view("shrink", "x", null);
  });
  expect(exited(o, 42) && o.text[0] == '\0', "the handler gets the error", o);

  o = in_child([&] {
    lm::set_error_handler([](const lm::Error&) {});
    lm::check::view("shrink", "x", null);
  });
  expect(aborted(o), "a handler that returns: abort, not on with bad input", o);

  o = in_child([&] {
    const auto first = [](const lm::Error&) { _exit(42); };
    const lm::ErrorHandler handler = first;
    if (lm::set_error_handler(handler) != nullptr) _exit(1);
    if (lm::set_error_handler(nullptr) != handler) _exit(2);
    lm::fail(lm::Error(lm::ErrorCode::file) << "default again");
  });
  expect(aborted(o) && std::strstr(o.text, "default again") != nullptr, "nullptr restores the default", o);

  o = in_child([&] {  // an engine that leaves by longjmp lives on
    lm::set_error_handler([](const lm::Error& error) {
      seen_code = error.code();
      std::snprintf(seen_text, sizeof seen_text, "%s", error.what());
      std::longjmp(back, 1);
    });
    static char memory[64];
    static volatile int errors = 0;
    if (setjmp(back) == 0)
      lm::Arena<>(memory, 64).take<double>(1000);
    else
      errors = errors + (seen_code == lm::ErrorCode::arena && std::strstr(seen_text, "too few") != nullptr);
    if (setjmp(back) == 0)
      lm::dropout_p16("op", 2.0);
    else
      errors = errors + (seen_code == lm::ErrorCode::value);
    if (setjmp(back) == 0)
      lm::Buffer<float>{INT64_MAX};
    else
      errors = errors + (seen_code == lm::ErrorCode::overflow);
    lm::ThreadPool pool(2);
    int jobs[8] = {};
    pool.executor().run(8, [&](lm::Index i, lm::Index) { jobs[i] = 1; });
    int done = 0;
    for (const int j : jobs) done += j;
    _exit(errors == 3 && done == 8 ? 42 : 44);
  });
  expect(exited(o, 42), "a handler may leave by longjmp; arena, draws, buffer and pool work", o);

  return failures == 0 ? 0 : 1;
}
