// Every adapter in files: what is saved comes back, bit for bit, configuration included.
#include <doctest/doctest.h>

#include "io/support.hpp"
#include "suite/subject.hpp"

namespace loramix_test {
namespace {

template <std::size_t... K>
std::vector<FileCase> all_file_cases(std::index_sequence<K...>) {
  std::vector<FileCase> all;
  for (auto part : {&file_part<K>...}) {
    for (const FileCase& c : part()) all.push_back(c);
  }
  return all;
}

}  // namespace

TEST_CASE("suite: a file keeps every bit of every adapter, and says its kind") {
  const Folder folder;
  const auto all = all_file_cases(std::make_index_sequence<file_parts>());
  CHECK(all.size() + 2 == all_subjects<float>().size());  // all but what is served, in two forms
  for (const FileCase& c : all) {
    CAPTURE(c.name);
    CHECK(c.check(c.form, folder / "") == "");
  }
}

}  // namespace loramix_test
