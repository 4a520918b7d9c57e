#pragma once
// Internal to the finance desk: how templates become cases, and what each kind provides.

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "rlhf/core/random.h"
#include "rlhf/data/finance_desk/desk.h"

namespace rlhf::finance {

/// Draws slot values of one split. A slot keeps its value within a case; `{amount2}` is a second draw of
/// `{amount}`, different from the first.
class SlotFiller {
 public:
  SlotFiller(RandomStream& random, Split split) : random_(random), split_(split) {}

  /// Replaces every `{slot}`. @throws InternalError for a slot that does not exist.
  std::string fill(std::string_view text);
  /// Returns the value of one slot.
  const std::string& value(const std::string& slot);
  /// Fixes a slot's value.
  void set(const std::string& slot, std::string value) { values_[slot] = std::move(value); }

 private:
  std::string draw(const std::string& family);

  RandomStream& random_;
  Split split_;
  std::map<std::string, std::string> values_;
};

/// Whether a number is kept for held-out cases; about one in four is.
bool is_held_out(std::uint64_t number);

/// The numbers `step * k` with k in [min_k, max_k].
struct NumberRange {
  std::uint64_t min_k;
  std::uint64_t max_k;
  std::uint64_t step;
};
/// Returns a number of the range that belongs to the split.
std::uint64_t draw_number(RandomStream& random, Split split, const NumberRange& range);

/// The part of a case that differs from draw to draw.
struct Draft {
  std::string question;
  std::string answer;
  std::string reference;
  std::string template_id;
};

/// What one kind provides to make_cases and corruptions.
struct KindSource {
  const char* instruction;
  std::vector<std::string> (*template_ids)(Split split);
  Draft (*draw)(Split split, RandomStream& random);
  std::vector<Corruption> (*corrupt)(const Case& item, RandomStream& random);
};
const KindSource& source_of(Kind kind);

KindSource intent_source();
KindSource gate_source();
KindSource calculation_source();
KindSource clause_source();
KindSource view_source();

/// Returns an entry of `choices` other than `not_this`, which must not be the only one.
const std::string& pick_other(const std::vector<std::string>& choices, const std::string& not_this,
                              RandomStream& random);

template <class T>
const T& pick(const std::vector<T>& choices, RandomStream& random) {
  return choices[random.below(choices.size())];
}

/// Puts one of several short openings, which differ between the splits, in front of a message.
std::string with_opening(const std::string& message, Split split, RandomStream& random);
/// The same for research notes.
std::string with_heading(const std::string& note, Split split, RandomStream& random);

}  // namespace rlhf::finance
