#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace rlhf {

/// Calls `visit` with the fields of each record of a CSV file (RFC 4180: quoted fields may hold commas, line
/// ends and doubled quotes; LF and CRLF; a byte order mark is skipped) and the line where it begins. Blank
/// lines are skipped.
/// @throws IoError `path:line: ...` for a file that cannot be read, a quote inside an unquoted field or one
/// that is never closed. An InvalidArgument of `visit` becomes an IoError with `path:line` in front.
void for_each_csv_record(
    const std::filesystem::path& path,
    const std::function<void(const std::vector<std::string>& fields, std::int64_t line)>& visit);

}  // namespace rlhf
