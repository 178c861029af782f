"""Do maps of words find things in the embedded model's images? `python benchmarks/concepts.py`, about 20 s on 2 cores.

For 32 captions of scenes: the share of pairs (token in the box of the thing, token outside) in which the map is larger
inside (AUC, 0.5 by chance). Boxes are those of the scene oracle. `concepts` compares all names of things and the sign.
`attention` is the attention of image tokens to the word. 95 % bootstrap intervals over images.
"""

import numpy as np
from scipy.stats import rankdata

import fluxlab
from fluxlab.measure.oracle import inspect
from fluxlab.probes import Probe, of_sample

THINGS = ("cat", "fox", "bird", "heart", "star", "circle", "square", "cross")
COLOURS = ("red", "blue", "green", "yellow")
PLACES = ("on the left", "on the right", "at the top", "at the bottom")
WORDS = ("open", "rain", "taxi", "moon", "book", "cafe", "free", "jazz")
CAPTURE = {
    "concepts": {"kind": "concepts", "words": [*THINGS, "sign"], "blocks": "double", "average": ["steps"]},
    "attention": {"kind": "words", "direction": "image_to_word", "average": ["heads", "steps"], "blocks": "double"},
}


def main() -> None:
    pipe, found = fluxlab.load_pipeline("tiny"), {}
    for n, (place, colour) in enumerate(zip(PLACES, COLOURS, strict=True)):
        words = WORDS[3 * n :] + WORDS[: 3 * n]
        pairs = zip(THINGS, words, strict=True)
        prompts = [f"a {colour} {thing} {place} holding a sign that says {word}" for thing, word in pairs]
        probe = Probe({"max_mb": 2000, **CAPTURE})
        images = pipe.generate(prompts, range(len(prompts)), steps=8, probe=probe)
        for b, (prompt, image, thing) in enumerate(zip(prompts, images, THINGS, strict=True)):
            report = inspect(np.asarray(image.convert("RGB")), prompt)
            if report.object and report.board:
                for name, maps in of_sample(probe.arrays, b).items():
                    for word, box in ((thing, report.things[0].box), ("sign", report.board.box)):
                        for block in maps.labels("block"):
                            values = maps.sel(word=word, block=block).values.squeeze()
                            key = f"{name}, {'sign' if word == 'sign' else 'thing'}, block {block}"
                            found.setdefault(key, []).append(auc(values, inside(box, image.height, len(values))))
    rng = np.random.default_rng(0)
    for key, values in sorted(found.items()):
        means = np.array(values)[rng.integers(len(values), size=(2000, len(values)))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        print(f"{key:<28} {np.mean(values):.2f} [{low:.2f}, {high:.2f}], n = {len(values)}")


def inside(box: tuple[int, int, int, int], pixels: int, tokens: int) -> np.ndarray:
    """Return which tokens have most of their area in a box (top, left, bottom, right) in pixels."""
    mask, side = np.zeros((pixels, pixels)), pixels // tokens
    mask[box[0] : box[2], box[1] : box[3]] = 1
    return mask.reshape(tokens, side, tokens, side).mean((1, 3)) > 0.5


def auc(values: np.ndarray, mask: np.ndarray) -> float:
    ranks, count = rankdata(values)[mask.ravel()], mask.sum()
    return float((ranks.sum() - count * (count + 1) / 2) / (count * (mask.size - count)))


if __name__ == "__main__":
    main()
