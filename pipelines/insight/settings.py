"""The settings of the stage `insight`; alone in a file, since every command reads them and they need none of its libraries."""

from pydantic import Field

from infra.settings import Settings


class InsightSettings(Settings):
    """Which clips of the judged split are looked at, and how many are shown.

    Attributes:
        classes: names of the classes whose clips are looked at; none names all.
        max_clips: of these classes, evenly spread over the split, go through the network once more for the map of features.
            2,000 are about as many as a picture and t-SNE can take.
        num_neighbours: the nearest clips that are asked for their class.
        num_examples: clips of each kind that are shown: most wrong, most unsure.
        num_pairs: pairs of a right and a wrong answer that are shown with attention and Grad-CAM; 0 for none.
    """

    classes: tuple[str, ...] = ()
    max_clips: int = Field(default=2000, ge=1)
    num_neighbours: int = Field(default=5, ge=1)
    num_examples: int = Field(default=8, ge=1)
    num_pairs: int = Field(default=2, ge=0)
