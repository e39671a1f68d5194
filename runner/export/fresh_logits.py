"""Stands alone: opens an exported model with plain transformers and prints its logits (started by
`export`). What it needs is imported before it is asked: whoever starts it early waits less."""

import gc
import json
import sys


def main() -> None:
    """Read a request from stdin, write an answer to stdout.

    The answer's keys: `missing`, names of weights that the folder does not hold; `logits`, windows
    of [L, 2] in the precision of its weights; `exact`, the same in float32, from the same weights.
    """
    gc.disable()  # a quarter of an import's time; nothing here makes garbage
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedModel

    _ = PreTrainedModel  # named, since transformers imports what is slow when it is named
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    model, loaded = AutoModelForQuestionAnswering.from_pretrained(
        request["model"], output_loading_info=True
    )
    model.to(request["device"]).eval()
    windows = [
        {
            name: torch.tensor([encoded[name][window]], device=request["device"])
            for name in tokenizer.model_input_names
            if name in encoded and name != "attention_mask"
        }
        for encoded in (
            tokenizer(
                question,
                context,
                truncation="only_second",
                max_length=request["max_length"],
                stride=request["stride"],
                return_overflowing_tokens=True,
            )
            for question, context in request["pairs"]
        )
        for window in range(len(encoded["input_ids"]))
    ][: request["windows"]]

    def logits() -> list[list[list[float]]]:
        found = []
        for inputs in windows:
            with torch.no_grad():
                output = model(**inputs)
            pair = torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)
            found.append(pair.float().cpu().tolist())
        return found

    answer = {"missing": sorted(loaded["missing_keys"]), "logits": logits()}
    model.float()
    json.dump({**answer, "exact": logits()}, sys.stdout)


if __name__ == "__main__":
    main()
