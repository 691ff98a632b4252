"""A task, once its rows are read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig, SamplingConfig
from ...config.evaluation import TaskConfig
from ...data.examples import Example
from ..perplexity import ReferenceLosses, reference_losses, text_losses

Scorer = Callable[[Sequence[str]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """Prompts with references.

    `scorer` gives each metric of one prediction for each example, in 0..1, and `quality_metric` names the one that says how
    good a way of decoding is. An answer ends at the first of the `stop` strings. `template` stands in for the checkpoint's own
    prompt template. `text` is what perplexity is measured on, in place of the references. `notes` are for the user to read
    before the run.
    """

    name: str
    examples: tuple[Example, ...]
    config: TaskConfig  # with every default filled in
    quality_metric: str
    scorer: Scorer
    stop: tuple[str, ...] = ()
    template: str | None = None
    text: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def max_new_tokens(self) -> int:
        assert self.config.max_new_tokens is not None
        return self.config.max_new_tokens

    def score(self, predictions: Sequence[str], perplexity: float | None = None) -> dict[str, float]:
        """The metrics of one prediction for each example, cut at the stop strings; an answer that failed is an empty text.

        `perplexity`: of the way of decoding, for a task on text.
        """
        if self.text is not None:
            return {} if perplexity is None else {"perplexity": perplexity}
        return self.scorer([cut(prediction, self.stop) for prediction in predictions])

    def losses(self, loaded: Decoder, exit_layers: Sequence[int]) -> Iterator[ReferenceLosses]:
        """Of each example's reference through each exit; of as many windows of the text, where the task has one."""
        if self.text is not None:
            yield from text_losses(loaded, self.text, self.config.samples, exit_layers)
        else:
            yield from (reference_losses(loaded, example, exit_layers) for example in self.examples)

    def decoding(self, setting: DecodingConfig) -> DecodingConfig:
        """A way of decoding, with this task's stop strings and sampling."""
        return replace(setting, stop=self.stop, sampling=SamplingConfig(self.config.temperature, seed=self.config.seed))

    def prepared(self, loaded: Decoder) -> Decoder:
        """The model, with this task's template if it has one."""
        return loaded if self.template is None else loaded.with_template(self.template, None)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((place for one in stop if (place := text.find(one)) >= 0), default=len(text))]
