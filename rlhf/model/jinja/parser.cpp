#include "rlhf/model/jinja/parser.h"

#include <algorithm>
#include <functional>
#include <initializer_list>

#include "rlhf/model/jinja/lexer.h"

namespace rlhf::jinja {
namespace {

using Kind = Expression::Kind;
using Words = std::initializer_list<std::string_view>;

constexpr int kMaxHeight = 200;

class Parser {
 public:
  explicit Parser(std::string_view source) : tokens_(tokenize(source)) {}

  Block parse() {
    Block block = parse_block({});
    if (current().kind != Token::Kind::kEnd) error("unexpected end tag");
    return block;
  }

 private:
  // --- tokens
  const Token& current() const { return tokens_[position_]; }
  const Token& ahead() const { return tokens_[std::min(position_ + 1, tokens_.size() - 1)]; }
  Token take() { return tokens_[position_ + 1 < tokens_.size() ? position_++ : position_]; }

  [[noreturn]] void error(const std::string& message) const { throw TemplateError(message, current().line); }

  bool at_operator(std::string_view op) const {
    return current().kind == Token::Kind::kOperator && current().text == op;
  }
  bool at_name(std::string_view name) const {
    return current().kind == Token::Kind::kName && current().text == name;
  }
  bool at_any_name(Words names) const {
    return std::any_of(names.begin(), names.end(), [&](std::string_view name) { return at_name(name); });
  }
  bool skip_operator(std::string_view op) {
    const bool found = at_operator(op);
    if (found) take();
    return found;
  }
  bool skip_name(std::string_view name) {
    const bool found = at_name(name);
    if (found) take();
    return found;
  }
  void expect_operator(std::string_view op) {
    if (!skip_operator(op)) error(concat("expected '", op, "', got ", describe(current())));
  }
  std::string expect_name() {
    if (current().kind != Token::Kind::kName) error(concat("expected a name, got ", describe(current())));
    return take().text;
  }
  void expect_word(std::string_view name) {
    if (!skip_name(name)) error(concat("expected '", name, "', got ", describe(current())));
  }
  void expect_block_end() {
    if (current().kind != Token::Kind::kBlockEnd)
      error(concat("expected end of statement block, got ", describe(current())));
    take();
  }
  static std::string describe(const Token& token) {
    switch (token.kind) {
      case Token::Kind::kEnd:
        return "end of template";
      case Token::Kind::kBlockEnd:
        return "end of statement block";
      case Token::Kind::kVariableEnd:
        return "end of print statement";
      default:
        return "'" + token.text + "'";
    }
  }

  /// Bounds the recursion of the parser itself.
  class Nesting {
   public:
    explicit Nesting(Parser& parser) : parser_(parser) {
      if (++parser_.depth_ > kMaxHeight) parser_.error(concat("nested deeper than ", kMaxHeight, " levels"));
    }
    ~Nesting() { --parser_.depth_; }

   private:
    Parser& parser_;
  };

  // --- nodes
  ExpressionPtr make(Kind kind) const {
    auto node = std::make_unique<Expression>();
    node->kind = kind;
    node->line = current().line;
    return node;
  }
  void adopt(Expression& parent, ExpressionPtr child) const {
    if (child) parent.height = std::max(parent.height, child->height + 1);
    if (parent.height > kMaxHeight)
      error(concat("an expression is nested deeper than ", kMaxHeight, " levels"));
    parent.children.push_back(std::move(child));
  }
  ExpressionPtr make_unary(Kind kind, ExpressionPtr operand) const {
    auto node = make(kind);
    adopt(*node, std::move(operand));
    return node;
  }
  ExpressionPtr make_binary(Kind kind, ExpressionPtr left, ExpressionPtr right, std::string name = "") const {
    auto node = make(kind);
    node->name = std::move(name);
    adopt(*node, std::move(left));
    adopt(*node, std::move(right));
    return node;
  }
  ExpressionPtr make_constant(Value value) const {
    auto node = make(Kind::kConstant);
    node->constant = std::move(value);
    return node;
  }

  // --- statements
  Block parse_block(Words ends) {
    const Nesting nesting(*this);
    Block block;
    while (current().kind != Token::Kind::kEnd) {
      if (current().kind == Token::Kind::kData) {
        auto text = start_statement(Statement::Kind::kText);
        text->name = take().text;
        block.push_back(std::move(text));
      } else if (current().kind == Token::Kind::kVariableBegin) {
        block.push_back(parse_output());
      } else {
        take();  // block begin
        if (at_any_name(ends)) return block;
        block.push_back(parse_statement());
      }
    }
    if (ends.size() > 0) error(concat("unexpected end of template, expected the tag ", *ends.begin()));
    return block;
  }

  std::unique_ptr<Statement> start_statement(Statement::Kind kind) const {
    auto statement = std::make_unique<Statement>();
    statement->kind = kind;
    statement->line = current().line;
    return statement;
  }

  std::unique_ptr<Statement> parse_output() {
    take();
    auto statement = start_statement(Statement::Kind::kOutput);
    statement->value = parse_tuple();
    if (current().kind != Token::Kind::kVariableEnd)
      error(concat("expected end of print statement, got ", describe(current())));
    take();
    return statement;
  }

  // The tag's name is current; afterwards its closing tag is consumed.
  std::unique_ptr<Statement> parse_statement() {
    const std::string tag = expect_name();
    if (tag == "if") return parse_if();
    if (tag == "for") return parse_for();
    if (tag == "set") return parse_set();
    if (tag == "macro") return parse_macro();
    if (tag == "call") return parse_call_block();
    if (tag == "with") return parse_with();
    if (tag == "filter") return parse_filter_block();
    if (tag == "generation") return parse_plain_body(Statement::Kind::kGeneration, "endgeneration");
    if (tag == "autoescape" || tag == "block") return parse_named_body(tag);
    if (tag == "break" || tag == "continue") return parse_jump(tag);
    if (tag == "print") {
      auto statement = start_statement(Statement::Kind::kOutput);
      statement->value = parse_tuple();
      expect_block_end();
      return statement;
    }
    error(concat("Encountered unknown tag '", tag, "'"));
  }

  std::unique_ptr<Statement> parse_if() {
    auto statement = start_statement(Statement::Kind::kIf);
    for (;;) {
      ExpressionPtr condition = parse_tuple(Ends{}, false);
      expect_block_end();
      Block body = parse_block({"elif", "else", "endif"});
      statement->branches.emplace_back(std::move(condition), std::move(body));
      const std::string tag = take().text;
      if (tag == "elif") continue;
      if (tag == "else") {
        expect_block_end();
        statement->otherwise = parse_block({"endif"});
        take();
      }
      expect_block_end();
      return statement;
    }
  }

  std::unique_ptr<Statement> parse_for() {
    auto statement = start_statement(Statement::Kind::kFor);
    statement->target = parse_target(Ends{"in"});
    expect_word("in");
    statement->value = parse_tuple(Ends{"recursive"}, false);
    if (skip_name("if")) statement->condition = parse_expression();
    statement->recursive = skip_name("recursive");
    expect_block_end();
    ++loop_depth_;
    statement->body = parse_block({"endfor", "else"});
    --loop_depth_;
    if (take().text == "else") {
      expect_block_end();
      statement->otherwise = parse_block({"endfor"});
      take();
    }
    expect_block_end();
    return statement;
  }

  std::unique_ptr<Statement> parse_set() {
    auto statement = start_statement(Statement::Kind::kSet);
    statement->target = parse_target(Ends{}, true);
    if (skip_operator("=")) {
      statement->value = parse_tuple();
      expect_block_end();
      return statement;
    }
    statement->kind = Statement::Kind::kSetBlock;
    if (at_operator("|")) statement->filter = parse_filters(nullptr);
    expect_block_end();
    statement->body = parse_block({"endset"});
    take();
    expect_block_end();
    return statement;
  }

  std::unique_ptr<Statement> parse_macro() {
    auto statement = start_statement(Statement::Kind::kMacro);
    statement->name = expect_name();
    statement->signature = parse_signature();
    finish_body(*statement, "endmacro");
    return statement;
  }

  std::unique_ptr<Statement> parse_call_block() {
    auto statement = start_statement(Statement::Kind::kCallBlock);
    if (at_operator("(")) statement->signature = parse_signature();
    statement->value = parse_expression();
    if (statement->value->kind != Kind::kCall) error("expected call");
    finish_body(*statement, "endcall");
    return statement;
  }

  std::unique_ptr<Statement> parse_with() {
    auto statement = start_statement(Statement::Kind::kWith);
    while (current().kind != Token::Kind::kBlockEnd) {
      if (!statement->assignments.empty()) expect_operator(",");
      ExpressionPtr target = parse_target(Ends{});
      expect_operator("=");
      statement->assignments.emplace_back(std::move(target), parse_expression());
    }
    finish_body(*statement, "endwith");
    return statement;
  }

  std::unique_ptr<Statement> parse_filter_block() {
    auto statement = start_statement(Statement::Kind::kFilterBlock);
    statement->filter = parse_one_filter(nullptr);
    if (at_operator("|")) statement->filter = parse_filters(std::move(statement->filter));
    finish_body(*statement, "endfilter");
    return statement;
  }

  std::unique_ptr<Statement> parse_plain_body(Statement::Kind kind, std::string_view end) {
    auto statement = start_statement(kind);
    finish_body(*statement, end);
    return statement;
  }

  std::unique_ptr<Statement> parse_named_body(const std::string& tag) {
    auto statement = start_statement(Statement::Kind::kBody);
    parse_expression();
    expect_block_end();
    statement->body = parse_block({tag == "block" ? "endblock" : "endautoescape"});
    take();
    if (tag == "block" && current().kind == Token::Kind::kName) take();
    expect_block_end();
    return statement;
  }

  std::unique_ptr<Statement> parse_jump(const std::string& tag) {
    if (loop_depth_ == 0) error(concat("'", tag, "' outside loop"));
    auto statement = start_statement(tag == "break" ? Statement::Kind::kBreak : Statement::Kind::kContinue);
    expect_block_end();
    return statement;
  }

  void finish_body(Statement& statement, std::string_view end) {
    expect_block_end();
    statement.body = parse_block({end});
    take();
    expect_block_end();
  }

  Signature parse_signature() {
    Signature signature;
    expect_operator("(");
    while (!at_operator(")")) {
      if (!signature.names.empty()) expect_operator(",");
      signature.names.push_back(expect_name());
      if (skip_operator("=")) {
        signature.defaults.push_back(parse_expression());
      } else if (!signature.defaults.empty()) {
        error("non-default argument follows default argument");
      }
    }
    expect_operator(")");
    return signature;
  }

  // --- targets and tuples
  /// Names that end a tuple without being part of it ("in" of a for loop).
  using Ends = std::vector<std::string_view>;

  ExpressionPtr parse_target(const Ends& ends, bool with_namespace = false) {
    if (with_namespace && current().kind == Token::Kind::kName && ahead().kind == Token::Kind::kOperator &&
        ahead().text == ".") {
      auto node = make(Kind::kNamespaceTarget);
      node->name = take().text;
      take();
      node->attribute = expect_name();
      return node;
    }
    auto target = parse_tuple_of([this] { return parse_primary(); }, ends);
    check_target(*target);
    return target;
  }

  void check_target(const Expression& target) const {
    if (target.kind == Kind::kTuple) {
      for (const auto& child : target.children) check_target(*child);
    } else if (target.kind != Kind::kName) {
      error("can't assign to this");
    }
  }

  bool at_tuple_end(const Ends& ends) const {
    if (current().kind == Token::Kind::kVariableEnd || current().kind == Token::Kind::kBlockEnd ||
        at_operator(")"))
      return true;
    return std::any_of(ends.begin(), ends.end(), [&](std::string_view name) { return at_name(name); });
  }

  ExpressionPtr parse_tuple_of(const std::function<ExpressionPtr()>& parse_one, const Ends& ends) {
    std::vector<ExpressionPtr> items;
    bool is_tuple = false;
    for (;;) {
      if (!items.empty() && !skip_operator(",")) break;
      is_tuple = !items.empty();
      if (at_tuple_end(ends)) break;
      items.push_back(parse_one());
    }
    if (!is_tuple) {
      if (items.empty()) error(concat("Expected an expression, got ", describe(current())));
      return std::move(items.front());
    }
    auto tuple = make(Kind::kTuple);
    for (auto& item : items) adopt(*tuple, std::move(item));
    return tuple;
  }

  ExpressionPtr parse_tuple(const Ends& ends = {}, bool with_condition = true) {
    return parse_tuple_of([&] { return with_condition ? parse_expression() : parse_or(); }, ends);
  }

  // --- expressions, lowest precedence first
  ExpressionPtr parse_expression() {
    const Nesting nesting(*this);
    ExpressionPtr value = parse_or();
    while (skip_name("if")) {
      auto node = make(Kind::kConditional);
      adopt(*node, parse_or());
      adopt(*node, std::move(value));
      adopt(*node, skip_name("else") ? parse_expression() : nullptr);
      value = std::move(node);
    }
    return value;
  }

  ExpressionPtr parse_or() {
    ExpressionPtr left = parse_and();
    while (skip_name("or")) left = make_binary(Kind::kOr, std::move(left), parse_and());
    return left;
  }

  ExpressionPtr parse_and() {
    ExpressionPtr left = parse_not();
    while (skip_name("and")) left = make_binary(Kind::kAnd, std::move(left), parse_not());
    return left;
  }

  ExpressionPtr parse_not() {
    if (!at_name("not")) return parse_compare();
    const Nesting nesting(*this);
    take();
    return make_unary(Kind::kNot, parse_not());
  }

  std::string take_comparison() {
    for (const char* op : {"==", "!=", "<", "<=", ">", ">="}) {
      if (skip_operator(op)) return op;
    }
    if (skip_name("in")) return "in";
    if (at_name("not") && ahead().kind == Token::Kind::kName && ahead().text == "in") {
      take();
      take();
      return "not in";
    }
    return "";
  }

  ExpressionPtr parse_compare() {
    ExpressionPtr first = parse_sum();
    std::string op = take_comparison();
    if (op.empty()) return first;
    auto node = make(Kind::kCompare);
    adopt(*node, std::move(first));
    for (; !op.empty(); op = take_comparison()) {
      node->operators.push_back(op);
      adopt(*node, parse_sum());
    }
    return node;
  }

  ExpressionPtr parse_sum() {
    ExpressionPtr left = parse_concat();
    while (at_operator("+") || at_operator("-")) {
      const std::string op = take().text;
      left = make_binary(Kind::kBinary, std::move(left), parse_concat(), op);
    }
    return left;
  }

  ExpressionPtr parse_concat() {
    ExpressionPtr first = parse_product();
    if (!at_operator("~")) return first;
    auto node = make(Kind::kConcat);
    adopt(*node, std::move(first));
    while (skip_operator("~")) adopt(*node, parse_product());
    return node;
  }

  ExpressionPtr parse_product() {
    ExpressionPtr left = parse_power();
    while (at_operator("*") || at_operator("/") || at_operator("//") || at_operator("%")) {
      const std::string op = take().text;
      left = make_binary(Kind::kBinary, std::move(left), parse_power(), op);
    }
    return left;
  }

  ExpressionPtr parse_power() {
    ExpressionPtr left = parse_unary(true);
    while (skip_operator("**")) left = make_binary(Kind::kBinary, std::move(left), parse_unary(true), "**");
    return left;
  }

  ExpressionPtr parse_unary(bool with_filter) {
    const Nesting nesting(*this);
    ExpressionPtr node;
    if (skip_operator("-")) {
      node = make_unary(Kind::kNegative, parse_unary(false));
    } else if (skip_operator("+")) {
      node = make_unary(Kind::kPositive, parse_unary(false));
    } else {
      node = parse_primary();
    }
    node = parse_postfix(std::move(node));
    return with_filter ? parse_filters_and_tests(std::move(node)) : std::move(node);
  }

  ExpressionPtr parse_primary() {
    const Token& token = current();
    switch (token.kind) {
      case Token::Kind::kName:
        return parse_name();
      case Token::Kind::kString:
        return parse_string();
      case Token::Kind::kInteger: {
        auto node = make_constant(token.integer);
        take();
        return node;
      }
      case Token::Kind::kFloat: {
        auto node = make_constant(token.number);
        take();
        return node;
      }
      default:
        break;
    }
    if (at_operator("(")) return parse_parentheses();
    if (at_operator("[")) return parse_list();
    if (at_operator("{")) return parse_dict();
    error(concat("unexpected ", describe(token)));
  }

  ExpressionPtr parse_name() {
    const std::string name = current().text;
    ExpressionPtr node;
    if (name == "true" || name == "True") {
      node = make_constant(true);
    } else if (name == "false" || name == "False") {
      node = make_constant(false);
    } else if (name == "none" || name == "None") {
      node = make_constant(Value());
    } else {
      node = make(Kind::kName);
      node->name = name;
    }
    take();
    return node;
  }

  // Neighbouring literals are one string.
  ExpressionPtr parse_string() {
    std::string text;
    auto node = make(Kind::kConstant);
    while (current().kind == Token::Kind::kString) text += take().text;
    node->constant = text;
    return node;
  }

  ExpressionPtr parse_parentheses() {
    const Nesting nesting(*this);
    take();
    if (at_operator(")")) {
      take();
      return make(Kind::kTuple);
    }
    ExpressionPtr node = parse_tuple();
    expect_operator(")");
    return node;
  }

  ExpressionPtr parse_list() {
    const Nesting nesting(*this);
    auto node = make(Kind::kList);
    take();
    while (!at_operator("]")) {
      if (!node->children.empty()) expect_operator(",");
      if (at_operator("]")) break;
      adopt(*node, parse_expression());
    }
    take();
    return node;
  }

  ExpressionPtr parse_dict() {
    const Nesting nesting(*this);
    auto node = make(Kind::kDict);
    take();
    while (!at_operator("}")) {
      if (!node->children.empty()) expect_operator(",");
      if (at_operator("}")) break;
      adopt(*node, parse_expression());
      expect_operator(":");
      adopt(*node, parse_expression());
    }
    take();
    return node;
  }

  ExpressionPtr parse_postfix(ExpressionPtr node) {
    for (;;) {
      if (at_operator(".") || at_operator("[")) {
        node = parse_subscript(std::move(node));
      } else if (at_operator("(")) {
        node = parse_call(std::move(node));
      } else {
        return node;
      }
    }
  }

  ExpressionPtr parse_subscript(ExpressionPtr object) {
    if (skip_operator(".")) {
      if (current().kind == Token::Kind::kInteger) {
        auto index = make_constant(current().integer);
        take();
        return make_binary(Kind::kItem, std::move(object), std::move(index));
      }
      auto node = make_unary(Kind::kAttribute, std::move(object));
      node->name = expect_name();
      return node;
    }
    expect_operator("[");
    std::vector<ExpressionPtr> parts;
    while (!at_operator("]")) {
      if (!parts.empty()) expect_operator(",");
      parts.push_back(parse_subscript_part());
    }
    expect_operator("]");
    if (parts.empty()) error("expected an index");
    if (parts.size() == 1) return make_binary(Kind::kItem, std::move(object), std::move(parts.front()));
    auto tuple = make(Kind::kTuple);
    for (auto& part : parts) adopt(*tuple, std::move(part));
    return make_binary(Kind::kItem, std::move(object), std::move(tuple));
  }

  ExpressionPtr parse_subscript_part() {
    const auto at_end = [&] { return at_operator("]") || at_operator(",") || at_operator(":"); };
    ExpressionPtr start = at_end() ? nullptr : parse_expression();
    if (!at_operator(":")) return start;
    auto slice = make(Kind::kSlice);
    adopt(*slice, std::move(start));
    for (int part = 0; part < 2; ++part) {
      const bool present = skip_operator(":") && !at_end();
      adopt(*slice, present ? parse_expression() : nullptr);
    }
    return slice;
  }

  ExpressionPtr parse_call(ExpressionPtr callee) {
    auto node = make_unary(Kind::kCall, std::move(callee));
    parse_arguments(*node);
    return node;
  }

  void parse_arguments(Expression& owner) {
    CallArguments& arguments = owner.arguments;
    const auto keep = [&](ExpressionPtr value) {
      owner.height = std::max(owner.height, value->height + 1);
      if (owner.height > kMaxHeight)
        error(concat("an expression is nested deeper than ", kMaxHeight, " levels"));
      return value;
    };
    expect_operator("(");
    for (bool first = true; !at_operator(")"); first = false) {
      if (!first) expect_operator(",");
      if (!first && at_operator(")")) break;
      if (skip_operator("**")) {
        arguments.double_star = keep(parse_expression());
      } else if (skip_operator("*")) {
        arguments.star = keep(parse_expression());
      } else if (current().kind == Token::Kind::kName && ahead().kind == Token::Kind::kOperator &&
                 ahead().text == "=") {
        std::string name = take().text;
        take();
        arguments.named.emplace_back(std::move(name), keep(parse_expression()));
      } else {
        if (!arguments.named.empty()) error("invalid syntax for function call expression");
        arguments.positional.push_back(keep(parse_expression()));
      }
    }
    expect_operator(")");
  }

  ExpressionPtr parse_filters_and_tests(ExpressionPtr node) {
    for (;;) {
      if (at_operator("|")) {
        node = parse_filters(std::move(node));
      } else if (at_name("is")) {
        node = parse_test(std::move(node));
      } else if (at_operator("(")) {
        node = parse_call(std::move(node));
      } else {
        return node;
      }
    }
  }

  std::string parse_dotted_name() {
    std::string name = expect_name();
    while (skip_operator(".")) name.append(1, '.').append(expect_name());
    return name;
  }

  // The current token is the name of the filter.
  ExpressionPtr parse_one_filter(ExpressionPtr operand) {
    auto node = make_unary(Kind::kFilter, std::move(operand));
    node->name = parse_dotted_name();
    if (at_operator("(")) parse_arguments(*node);
    return node;
  }

  ExpressionPtr parse_filters(ExpressionPtr node) {
    while (skip_operator("|")) node = parse_one_filter(std::move(node));
    return node;
  }

  ExpressionPtr parse_test(ExpressionPtr operand) {
    take();
    const bool negated = skip_name("not");
    auto node = make_unary(Kind::kTest, std::move(operand));
    node->name = parse_dotted_name();
    if (at_operator("(")) {
      parse_arguments(*node);
    } else if (at_test_argument()) {
      if (at_name("is")) error("You cannot chain multiple tests with is");
      node->arguments.positional.push_back(parse_postfix(parse_primary()));
      node->height = std::max(node->height, node->arguments.positional.back()->height + 1);
    }
    return negated ? make_unary(Kind::kNot, std::move(node)) : std::move(node);
  }

  bool at_test_argument() const {
    switch (current().kind) {
      case Token::Kind::kString:
      case Token::Kind::kInteger:
      case Token::Kind::kFloat:
        return true;
      case Token::Kind::kName:
        return !at_any_name({"else", "or", "and"}) && !at_any_name({"if"}) && !at_any_name({"not"});
      default:
        return at_operator("[") || at_operator("{");
    }
  }

  std::vector<Token> tokens_;
  std::size_t position_ = 0;
  int depth_ = 0;
  int loop_depth_ = 0;
};

}  // namespace

Block parse_template(std::string_view source) {
  return Parser(source).parse();
}

}  // namespace rlhf::jinja
