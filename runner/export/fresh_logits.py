"""Stands alone: opens an exported model with plain transformers and prints its logits (started by
`export`)."""

import json
import sys


def main() -> None:
    """Read a request from stdin, write {"dtype", "logits"} to stdout."""
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    model = (
        AutoModelForQuestionAnswering.from_pretrained(request["model"]).to(request["device"]).eval()
    )
    logits: list[list[list[float]]] = []
    for question, context in request["pairs"]:
        encoded = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=request["max_length"],
            stride=request["stride"],
            return_overflowing_tokens=True,
        )
        for window in range(len(encoded["input_ids"])):
            inputs = {
                name: torch.tensor([encoded[name][window]], device=request["device"])
                for name in tokenizer.model_input_names
                if name in encoded and name != "attention_mask"
            }
            with torch.no_grad():
                output = model(**inputs)
            pair = torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)
            logits.append(pair.float().cpu().tolist())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    json.dump({"dtype": dtype, "logits": logits[: request["windows"]]}, sys.stdout)


if __name__ == "__main__":
    main()
