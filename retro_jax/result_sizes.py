"""The sizes of `make results`: how much text each takes, and how it is evaluated."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """How much text a size takes, and how it is evaluated.

    Attributes:
      languages: patterns of the documents' languages.
      domains: patterns of their collections: of the database, and of what is validated on.
      more_domains: further ones that are validated on alone, so that no source has too few documents.
      train_bytes, valid_bytes: text trained on and retrieved from, and validated on, equal shares of every source; None
        for all.
      files: that the documents of the database are dealt to, about 2 MB each: what a kill leaves finished.
      max_characters, valid_characters: documents longer than this are cut; many short ones say more than a few long.
      articles, passages: of WikiText and LAMBADA.
      vocab_size: of the tokenizer.
      length: tokens of a training sequence, and of a window.
      steps: checkpoints whose loss is drawn against the step.
      ks, shares: swept over.
      datastore_share: of the database's documents, for the datastore of kNN-LM, which has a key a token; so few that
        they are searched exactly.
      people: of whom facts are planted.
      planted_steps: of training on them.
    """

    languages: tuple[str, ...]
    domains: tuple[str, ...]
    more_domains: tuple[str, ...]
    train_bytes: int | None
    valid_bytes: int | None
    files: int
    max_characters: int
    valid_characters: int
    articles: int
    passages: int
    vocab_size: int
    length: int
    steps: tuple[int, ...]
    ks: tuple[int, ...]
    shares: tuple[float, ...]
    datastore_share: float
    people: int
    planted_steps: int


# Whole collections, chosen for what recurs in them. Of the words of their held-out text 12.1 % stand in stretches of 8
# words that these documents, cut as they are, hold as well (13.3 % in all of the text that there is); a sample of all
# collections that is as large has 6.4 %.
_RELATED = (
    *("factbook", "enwiki-2018", "standardebooks", "rust-blog", "node-blog", "php-docs", "tldr", "rbe", "react-docs"),
    *("code-okhttp", "code-sinatra", "code-svelte", "code-kotlinx.coroutines", "code-tokio", "code-fastapi"),
    "code-newtonsoft.json",
)
_LANGUAGES = ("en", "python", "c", "c++", "java", "javascript", "typescript", "go", "rust", "kotlin", "ruby", "shell")
SIZES = {
    "small": Size(
        languages=("*",),
        domains=_RELATED,
        more_domains=("enwiki-core",),
        train_bytes=None,
        valid_bytes=None,
        files=9,
        max_characters=8_000,
        valid_characters=8_000,
        articles=16,
        passages=300,
        vocab_size=4096,
        length=512,
        steps=(450, 900),
        ks=(1, 2, 4, 10, 20),
        shares=(1.0, 0.5, 0.25, 0.125, 0.0625),
        datastore_share=0.05,
        people=1500,
        planted_steps=360,
    ),
    "large": Size(
        languages=_LANGUAGES,
        domains=("*",),
        more_domains=(),
        train_bytes=170_000_000,
        valid_bytes=2_000_000,
        files=85,
        max_characters=100_000,
        valid_characters=30_000,
        articles=60,
        passages=1000,
        vocab_size=16_384,
        length=1024,
        steps=(1000, 2000, 3000),
        ks=(1, 2, 3, 4, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100),
        shares=(1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125),
        datastore_share=0.01,
        people=1500,
        planted_steps=360,
    ),
    "trial": Size(
        languages=("en",),
        domains=("*",),
        more_domains=(),
        train_bytes=300_000,
        valid_bytes=50_000,
        files=2,
        max_characters=4_000,
        valid_characters=2_000,
        articles=2,
        passages=20,
        vocab_size=1024,
        length=256,
        steps=(15,),
        ks=(1, 10),
        shares=(1.0, 0.25),
        datastore_share=0.5,
        people=60,
        planted_steps=30,
    ),
}
