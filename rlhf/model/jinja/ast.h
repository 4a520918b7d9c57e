#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "rlhf/model/jinja/value.h"

namespace rlhf::jinja {

struct Expression;
using ExpressionPtr = std::unique_ptr<Expression>;

/// Arguments as written in a call, filter or test.
struct CallArguments {
  std::vector<ExpressionPtr> positional;
  std::vector<std::pair<std::string, ExpressionPtr>> named;
  ExpressionPtr star;         // *args
  ExpressionPtr double_star;  // **kwargs
};

/// A node of an expression; what `name`, `children` and `arguments` hold depends on the kind.
struct Expression {
  enum class Kind {
    kConstant,         // constant
    kName,             // name
    kList,             // children
    kTuple,            // children
    kDict,             // children: key, value, key, value, ...
    kAttribute,        // children[0] . name
    kItem,             // children[0] [ children[1] ]
    kSlice,            // children: start, stop, step (null when left out); only as the subscript of kItem
    kCall,             // children[0] ( arguments )
    kFilter,           // children[0] | name ( arguments ); children[0] is null in a filter block
    kTest,             // children[0] is name ( arguments )
    kNot,              // children[0]
    kNegative,         // children[0]
    kPositive,         // children[0]
    kBinary,           // children[0] name children[1], name being + - * / // % **
    kConcat,           // children joined as text
    kAnd,              // children[0] and children[1]
    kOr,               // children[0] or children[1]
    kCompare,          // children[0] operators[0] children[1] operators[1] ...
    kConditional,      // children: condition, value, other (null when left out)
    kNamespaceTarget,  // name . attribute, only as the target of set
  };
  Kind kind = Kind::kConstant;
  int line = 1;
  /// Levels below this node: bounds the recursion of everything that walks the tree.
  int height = 1;
  std::string name;
  std::string attribute;
  Value constant;
  std::vector<ExpressionPtr> children;
  std::vector<std::string> operators;
  CallArguments arguments;
};

struct Statement;
using Block = std::vector<std::unique_ptr<Statement>>;

/// Parameters of a macro or of the caller of a call block; the last `defaults` belong to the last names.
struct Signature {
  std::vector<std::string> names;
  std::vector<ExpressionPtr> defaults;
};

struct Statement {
  enum class Kind {
    kText,         // name: the text
    kOutput,       // value
    kIf,           // branches; otherwise
    kFor,          // target in value if condition; body; otherwise
    kSet,          // target = value
    kSetBlock,     // target = body, through filter (may be null)
    kWith,         // targets = values; body
    kMacro,        // name, signature, body
    kCallBlock,    // value: the call; signature of the caller, body
    kFilterBlock,  // filter, body
    kGeneration,   // body: marks text that the assistant wrote
    kBody,         // body: {% block %}, {% autoescape %}
    kBreak,
    kContinue,
  };
  Kind kind = Kind::kText;
  int line = 1;
  std::string name;
  ExpressionPtr target;
  ExpressionPtr value;
  ExpressionPtr condition;
  ExpressionPtr filter;
  bool recursive = false;
  std::vector<std::pair<ExpressionPtr, Block>> branches;
  std::vector<std::pair<ExpressionPtr, ExpressionPtr>> assignments;
  Signature signature;
  Block body;
  Block otherwise;
};

}  // namespace rlhf::jinja
