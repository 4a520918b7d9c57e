#include <fcntl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <fstream>

#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/core/mapped_file.h"
#include "tests/catch.h"
#include "tests/data/temporary_folder.h"

using namespace rlhf;
namespace fs = std::filesystem;

namespace {

std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename().string());
  return names;
}

// While it lives, this process cannot write files longer than `bytes`.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    old_handler_ = std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old_);
    rlimit limit = old_;
    limit.rlim_cur = bytes;
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &old_);
    std::signal(SIGXFSZ, old_handler_);
  }

 private:
  rlimit old_{};
  void (*old_handler_)(int) = nullptr;
};

}  // namespace

TEST_CASE("a file appears when it is complete and replaces the old one") {
  TemporaryFolder folder;
  const fs::path path = folder.path() / "value";
  {
    AtomicFile file(path);
    file.write("old");
    CHECK_FALSE(fs::exists(path));
    file.commit();
  }
  CHECK(read_text_file(path) == "old");
  {
    AtomicFile file(path);
    file.write("new ");
    file.write("text");
    CHECK(read_text_file(path) == "old");
    file.commit();
    CHECK_THROWS_WITH(file.commit(), ContainsSubstring("committed twice"));
    CHECK_THROWS_WITH(file.write("more"), ContainsSubstring("write after commit"));
  }
  CHECK(read_text_file(path) == "new text");
  CHECK(names_in(folder.path()) == std::vector<std::string>{"value"});
}

TEST_CASE("an atomic file gets the permissions that a plain file would have") {
  TemporaryFolder folder;
  const mode_t mask = umask(027);
  write_file_atomically(folder.path() / "value", "x");
  umask(mask);
  struct stat status {};
  REQUIRE(stat((folder.path() / "value").c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == 0640);
}

TEST_CASE("without commit nothing changes and nothing is left behind") {
  TemporaryFolder folder;
  const fs::path path = folder.write("value", "old");
  { AtomicFile(path).write("half"); }
  CHECK(read_text_file(path) == "old");
  CHECK(names_in(folder.path()) == std::vector<std::string>{"value"});
}

TEST_CASE("the old content survives a write that fails, and the message says where") {
  TemporaryFolder folder;
  const fs::path path = folder.write("value", "old");
  {
    const FileSizeLimit limit(1000);
    CHECK_THROWS_WITH(write_file_atomically(path, std::string(5000, 'x')),
                      path.string() + ": cannot write at offset 1000: File too large");
  }
  CHECK(read_text_file(path) == "old");
  CHECK(names_in(folder.path()) == std::vector<std::string>{"value"});
}

TEST_CASE("the old content survives a full disk") {
  TemporaryFolder folder;
  if (mount("tmpfs", folder.path().c_str(), "tmpfs", 0, "size=64k") != 0) {
    WARN("skipped: a tiny tmpfs cannot be mounted here: " << std::strerror(errno));
    return;
  }
  const fs::path path = folder.write("value", "old");
  CHECK_THROWS_WITH(write_file_atomically(path, std::string(1 << 20, 'x')),
                    ContainsSubstring("No space left on device (free some space or choose another folder)"));
  CHECK(read_text_file(path) == "old");
  CHECK(names_in(folder.path()) == std::vector<std::string>{"value"});
  umount(folder.path().c_str());
}

TEST_CASE("files that cannot be made name their path") {
  TemporaryFolder folder;
  const fs::path missing = folder.path() / "no" / "value";
  CHECK_THROWS_WITH(AtomicFile(missing),
                    missing.string() + ": cannot create at offset 0: No such file or directory");
  write_file_atomically(missing, "made with its folder");
  CHECK(read_text_file(missing) == "made with its folder");
  const fs::path below_file = folder.write("file", "x") / "value";
  CHECK_THROWS_WITH(write_file_atomically(below_file, "x"),
                    ContainsSubstring((folder.path() / "file").string() + ": cannot create the folder: "));
  // A folder is in the way of the rename.
  const fs::path taken = folder.path() / "no";
  CHECK_THROWS_WITH(write_file_atomically(taken, "x"), ContainsSubstring("cannot rename into place"));
  CHECK(fs::is_directory(taken));
}

TEST_CASE("reading a text file names what is wrong") {
  TemporaryFolder folder;
  CHECK_THROWS_WITH(read_text_file(folder.path() / "none"),
                    (folder.path() / "none").string() + ": no such file");
  CHECK_THROWS_WITH(read_text_file(folder.path()), folder.path().string() + ": expected a regular file");
  const fs::path path = folder.write("big", std::string(200001, 'a'));
  CHECK(read_text_file(path).size() == 200001);
  CHECK_THROWS_WITH(read_text_file(path, 200000), path.string() + ": larger than the limit of 200000 bytes");
  CHECK(read_text_file(folder.write("bytes", std::string_view("a\0b\r\n", 5))) == std::string("a\0b\r\n", 5));
  CHECK(read_text_file(folder.write("empty", "")).empty());
}

TEST_CASE("a mapped file shows the file's bytes and moves") {
  TemporaryFolder folder;
  std::string text;
  for (int i = 0; i < 10000; ++i) text += static_cast<char>(i * 7);
  MappedFile file(folder.write("data", text));
  const auto as_text = [](const MappedFile& mapped) {
    return std::string(reinterpret_cast<const char*>(mapped.bytes().data()), mapped.bytes().size());
  };
  CHECK(as_text(file) == text);
  MappedFile moved(std::move(file));
  CHECK(as_text(moved) == text);
  CHECK(file.bytes().empty());
  MappedFile other(folder.write("other", "abc"));
  other = std::move(moved);
  CHECK(as_text(other) == text);
  CHECK(other.path() == folder.path() / "data");
  MappedFile& self = other;
  other = std::move(self);
  CHECK(as_text(other) == text);
  CHECK(MappedFile(folder.write("empty", "")).bytes().empty());
}

TEST_CASE("a pipe is written to and a link is followed: neither becomes a file") {
  TemporaryFolder folder;
  const auto pipe = folder.path() / "pipe";
  REQUIRE(mkfifo(pipe.c_str(), 0600) == 0);
  // Open for reading too, so that nobody waits.
  const int reader = open(pipe.c_str(), O_RDWR | O_CLOEXEC);
  REQUIRE(reader >= 0);
  write_file_atomically(pipe, "through");
  char text[16] = {};
  CHECK(read(reader, text, sizeof text) == 7);
  CHECK(std::string(text) == "through");
  close(reader);
  CHECK(std::filesystem::is_fifo(pipe));

  const auto target = folder.write("target", "old"), link = folder.path() / "link";
  std::filesystem::create_symlink(target, link);
  write_file_atomically(link, "new");
  CHECK(std::filesystem::is_symlink(link));
  CHECK(read_text_file(target) == "new");
}

TEST_CASE("what cannot be mapped is named") {
  TemporaryFolder folder;
  CHECK_THROWS_WITH(MappedFile(folder.path() / "none"),
                    (folder.path() / "none").string() + ": cannot open: No such file or directory");
  CHECK_THROWS_WITH(MappedFile(folder.path()), folder.path().string() + ": expected a regular file");
  CHECK_THROWS_AS(MappedFile("/dev/null"), IoError);
}

TEST_CASE("errors are made of what they are given") {
  CHECK(concat("a ", 1, ' ', 2.5, std::string(" b")) == "a 1 2.5 b");
  CHECK_THROWS_AS(fail<IoError>("x"), Error);
  CHECK_THROWS_WITH(fail<MemoryError>("needs ", 3, " MiB"), "needs 3 MiB");
  const int count = 4;
  CHECK_THROWS_AS([&] { RLHF_CHECK(count == 5, "count is ", count); }(), InvalidArgument);
  CHECK_THROWS_WITH([&] { RLHF_CHECK(count == 5, "count is ", count, ", expected 5"); }(),
                    "count is 4, expected 5");
  CHECK_NOTHROW([&] { RLHF_CHECK(count == 4, "count is ", count); }());
}
