#!/usr/bin/env bash
# transformers (5.24.0) has a collator that lays texts end to end, with positions that start anew with each text, from 0. BERT
# takes them as its own. XLM-RoBERTa, RoBERTa and their kin (BGE-M3, multilingual E5) count from 2, one after the padding token,
# though their documentation gives the range from 0 as BERT's does: their first two words get vectors of positions that no text
# has in training, one of which is the padding's, zero and never trained. No error, no word of positions; every embedding is another.
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.24.0 numpy==2.4.6
python - <<'P' 2> /dev/null
import torch
from transformers import AutoModel, BertConfig, DataCollatorWithFlattening, XLMRobertaConfig

ids = [0, 7, 9, 8, 2]
positions = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": ids}, {"input_ids": ids}])["position_ids"][:, :5]
print("positions of the collator:", positions.tolist()[0])
for config in (BertConfig, XLMRobertaConfig):
    torch.manual_seed(0)
    settings = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModel.from_config(config(**settings)).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings.weight)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        alone = model(tokens).last_hidden_state
        shifts = {n: torch.allclose(alone, model(tokens, position_ids=positions + n).last_hidden_state, atol=1e-5) for n in (0, 2)}
    print(f"{config.model_type}: the same as the text alone with positions from 0: {shifts[0]}, from 2: {shifts[2]}")
    assert shifts[0] == (config is BertConfig) and shifts[2] == (config is XLMRobertaConfig)
P
