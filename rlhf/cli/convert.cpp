#include <filesystem>
#include <iostream>

#include "rlhf/cli/model_arguments.h"
#include "rlhf/cli/verbs.h"
#include "rlhf/core/error.h"

namespace rlhf::cli {

void add_convert(CLI::App& app) {
  struct Arguments {
    std::string input, output;
    bool overwrite = false;
  };
  auto* verb =
      app.add_subcommand("convert", "Write a model as a Hugging Face directory (float32 safetensors)");
  auto a = std::make_shared<Arguments>();
  verb->add_option("input", a->input, "GGUF file or Hugging Face directory")->required();
  verb->add_option("output", a->output, "New directory")->required();
  verb->add_flag("--overwrite", a->overwrite, "Write into an existing directory");
  verb->callback([a] {
    if (std::filesystem::exists(a->output) && !a->overwrite)
      fail<Error>(a->output, " exists; pass --overwrite to write into it");
    LoadedModel(a->input, 0).model.save(a->output);
    std::cerr << "wrote " << a->output << "\n";
  });
}

}  // namespace rlhf::cli
