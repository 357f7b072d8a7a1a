"""A shop's FAQ as a chat: the nearest question is found by its meaning, and a small model words the answer.

python examples/projects/faq_chat.py "When do you open on Sundays?"     # without a question: a chat in the terminal
"""

import argparse

import torch

import keifu
from keifu.inference.chat.conversation import Conversation
from keifu.inference.embeddings.encoders import embed

FAQ = {
    "When is the shop open?": "We are open from 9 to 18 o'clock from Monday to Saturday, and closed on Sundays.",
    "How much is the delivery to my house?": "Delivery is 4 euros, and free for orders of 50 euros or more.",
    "How long does delivery take?": "Orders arrive within 3 working days, abroad within 10.",
    "Can I return what I bought?": "Yes, send it back within 30 days, unused; the return label lies in the parcel.",
    "Which ways of payment are there?": "You can pay by card, by bank transfer, or in the shop in cash.",
    "Do you repair what you sell?": "Yes: bring it to the shop. Within two years a repair costs nothing.",
    "Do you have gift cards?": "Yes, of 10, 25 and 50 euros, at the till and on our page.",
}
UNSURE = "I do not know that. Please write to us, and a person will answer."
NEAR = 0.35  # cosine from which a question counts as one of these; unrelated ones have about 0.1
ORDER = "You are the helper of a shop. Answer the customer in one sentence, only with this fact: {}"


class Helper:
    """Helper that looks up the entry that a question means, and answers with it."""

    def __init__(self, writer: str | None):
        self.encoder = keifu.load("minilm")
        self.writer = keifu.load(writer) if writer else None
        self.entries = embed(*self.encoder, [text for entry in FAQ.items() for text in entry])  # question, answer, ...

    def find(self, question: str) -> tuple[str | None, float]:
        """Return the nearest question of the list, compared with it and its answer, if one is near; and the cosine."""
        [cosines] = embed(*self.encoder, [question]) @ self.entries.T
        best = int(torch.argmax(cosines))
        near = float(cosines[best])
        return (list(FAQ)[best // 2] if near >= NEAR else None), near

    def answer(self, question: str) -> str:
        """Return the shop's answer, in the words of the model if there is one."""
        found, _ = self.find(question)
        if found is None:
            return UNSURE
        if self.writer is None:
            return FAQ[found]
        talk = Conversation(*self.writer, system=ORDER.format(FAQ[found]))
        return "".join(talk.reply(question, temperature=0.0, max_tokens=60)).strip()


def main() -> None:
    """Answer one question, or many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?")
    parser.add_argument("--writer", default=None, help="a chat model that words the answers, such as smollm2")
    options = parser.parse_args()
    helper = Helper(options.writer)
    if options.question:
        print(helper.answer(options.question))
        return
    print("Ask (an empty line ends):")
    while question := input("> ").strip():
        print(helper.answer(question))


if __name__ == "__main__":
    main()
