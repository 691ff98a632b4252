"""An inspection as one HTML page: a row for each layer, a column for each token, green from where it stayed right."""

from html import escape

from ..measure.inspect import Inspection, TokenTrace

_CSS = """
:root { color-scheme: light dark; --back: #fcfcfb; --text: #1d2328; --soft: #66707a; --line: #dfe3e6; --right: 63 155 95;
  --early: 224 160 57; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181b; --text: #e3e7ea; --soft: #98a2ab; --line: #2f373d; }
}
body { margin: 0; padding: 1rem; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: .4rem 0; overflow-wrap: anywhere; } p { margin: .4rem 0; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding-left: .7rem; margin: .5rem 0;
  border-left: 3px solid var(--line); }
.table { overflow-x: auto; } table { border-collapse: separate; border-spacing: 1px; font: 12px/1.4 ui-monospace, monospace; }
td, th { padding: .1rem .35rem; white-space: pre; text-align: left; font-weight: 400; max-width: 9rem; overflow: hidden;
  text-overflow: ellipsis; }
th { color: var(--soft); position: sticky; left: 0; background: var(--back); text-align: right; }
tfoot td, thead td { font-weight: 600; }
.right { background: rgb(var(--right) / calc(.18 + .5 * var(--p))); } .early { background: rgb(var(--early) / .3); }
.wrong { color: var(--soft); }
"""


def inspection_page(found: Inspection) -> str:
    """The page; it needs no other file. Hovering a cell tells the probability."""
    answer = "".join(one.token for one in found.tokens)
    verdict = f"On the average a token needed {found.mean_layers:.1f} of {found.num_layers} layers."
    head = "".join(f"<td>{_shown(one.token)}</td>" for one in found.tokens)
    rows = "".join(
        f"<tr><th scope=row>{layer}</th>{''.join(_cell(one, layer) for one in found.tokens)}</tr>"
        for layer in range(found.num_layers, 0, -1)
    )
    settled = "".join(f"<td>{one.settled}</td>" for one in found.tokens)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(found.model)}: layer by layer</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head><body>'
        f"<h1>{escape(found.model)}, layer by layer</h1><pre>{escape(found.prompt)}</pre><pre>{escape(answer)}</pre>"
        f"<p>{verdict} Green: the prediction from which on the token stayed right; yellow: right, but given up again.</p>"
        f'<div class="table"><table><thead><tr><th>layer</th>{head}</tr></thead><tbody>{rows}</tbody>'
        f"<tfoot><tr><th>needed</th>{settled}</tr></tfoot></table></div></body></html>\n"
    )


def _cell(one: TokenTrace, layer: int) -> str:
    said = one.predictions[layer - 1]
    kind = "right" if layer >= one.settled else "early" if said.token == one.token else "wrong"
    tip = f"layer {layer}: {escape(repr(said.token))} {said.probability:.0%}"
    return f'<td class={kind} style="--p:{said.probability:.2f}" title="{tip}">{_shown(said.token)}</td>'


def _shown(token: str) -> str:
    """A token with its blanks to be seen."""
    return escape(token.replace(" ", "\N{OPEN BOX}").replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"))
