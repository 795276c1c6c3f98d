"""Settings of the verdict at the end of an unlearning run."""

from typing import Annotated

from pydantic import Field

from erasediff.config.fields import Count, Fraction, Section


class VerdictConfig(Section):
    """Verdict of a run: which judges look at how many images, and what they must not or must still see.

    Attributes:
        enabled: End the run with a verdict.
        judges: Judges besides the original model, such as clip:FOLDER; the first of them decides in its place.
        keep: Name, in the run's folder, of a model that is not both forgotten and retained; None for one that says why:
            model-not-forgotten, model-damaged or model-unproven.
        images: Images of what is forgotten, and as many of what is retained, each by the model before and after; None
            for as many as take a quarter of the run's time, between 20 and 60; of an unconditional model, 200 and 500.
        forgotten_limit: Largest share of images asked for what is forgotten in which a judge sees it.
        share_limit: For an unconditional model: largest share of images of what is forgotten, relative to before.
        nothing_limit: For an unconditional model: largest rise of the share of images that show nothing.
        shift_limit: For an unconditional model: largest change of the proportion of a retained class, where chance does
            not explain it.
        unseen_data: For listed files: image folder or data set, of the same kind, that the original model was not
            trained on; None for none.
        auc_limit: For listed files: largest AUC by which the loss may tell forgotten images from unseen ones.
        loss_limit: For listed files: largest rise of the retained images' loss, relative to before.
        retained_limit: Largest drop of the share of retained images that show what they were asked for, in the mean.
        worst_limit: Largest drop of that share for one retained class or caption.
        control_limit: Least share of the original model's images in which a judge must see what they were asked for.
    """

    enabled: bool = True
    judges: tuple[str, ...] = ()
    keep: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    images: Count | None = None
    forgotten_limit: Fraction = 0.1
    share_limit: Fraction = 0.2
    nothing_limit: Fraction = 0.05
    shift_limit: Fraction = 0.1
    unseen_data: str | None = None
    auc_limit: Fraction = 0.6
    loss_limit: Fraction = 0.05
    retained_limit: Fraction = 0.05
    worst_limit: Fraction = 0.25
    control_limit: Fraction = 0.5
