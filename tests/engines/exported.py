"""Load saved models in a process that cannot import softrl: `python exported.py FOLDERS_JSON IDS_JSON OUTPUT`.

Writes the logits of a text's ids by each folder's model, and what it generates, to `OUTPUT` (safetensors).
"""

import json
import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main():
    assert "softrl" not in sys.modules
    sys.modules["softrl"] = None  # whoever imports it from now on fails, and nobody has before
    tensors, ids = {}, torch.tensor(json.loads(sys.argv[2]))
    for folder in json.loads(sys.argv[1]):
        adapter = (Path(folder) / "adapter_config.json").is_file()
        loader = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
        model = loader.from_pretrained(folder).eval().double()  # so that the order of additions does not matter
        with torch.no_grad():
            tensors[f"{folder}:logits"] = model(ids).logits
            tensors[f"{folder}:text"] = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    save_file(tensors, sys.argv[3])


if __name__ == "__main__":
    main()
