"""The tokens of a trace coloured by their rewards, as HTML for reports, pages and notebooks."""

import math

from markupsafe import Markup, escape

from tracereward.rewards.token_scores import TokenScores

# sRGB of (-limit, zero, +limit). Orange and blue are distinguishable with all common forms of colour blindness; the
# page's text has a contrast of at least 4.5 : 1 on every colour.
LIGHT = ((0xF2, 0x9E, 0x4C), (0xF6, 0xF6, 0xF4), (0x6A, 0xAE, 0xDE))
DARK = ((0x9A, 0x50, 0x0A), (0x26, 0x29, 0x2E), (0x1B, 0x62, 0xA0))


HEATMAP_CSS = Markup("""\
.heat { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; color: #1d2126; background: #fff;
  font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.heat .t { position: relative; margin-right: 1px; padding: .16em 0 .24em; border-radius: 2px; cursor: default;
  background: var(--l);
  -webkit-box-decoration-break: clone; box-decoration-break: clone;
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.heat .s { box-shadow: inset 0 -2px #6b7280; }
.heat .n::before { content: "↵"; opacity: .45; }
.heat .z::before { content: "·"; opacity: .6; }
.heat .e::before { content: "■"; opacity: .6; font-size: .7em; padding: 0 .3em; }
.heat .t:hover { outline: 1px solid #6b7280; }
.heat .t:focus { outline: 2px solid #1d2126; z-index: 1; }
.heat .t:focus::after { content: attr(title); position: absolute; left: 0; bottom: calc(100% + 4px);
  transform: translateX(-30%); padding: .1em .45em; border-radius: 3px; background: #1d2126; color: #fff;
  font-size: .8rem; line-height: 1.5; white-space: nowrap; pointer-events: none; }
@media screen and (prefers-color-scheme: dark) {
  .heat { color: #e9ebee; background: #16181b; }
  .heat .t { background: var(--d); }
  .heat .s { box-shadow: inset 0 -2px #9aa1ab; }
  .heat .t:focus { outline-color: #e9ebee; }
  .heat .t:focus::after { background: #e9ebee; color: #16181b; }
}
""")


def reward_colour(reward: float, limit: float, dark: bool = False) -> str:
    """The colour of a reward as `#rrggbb`: linear in sRGB from neutral at 0 to blue at `limit` and orange at `-limit`.

    Rewards beyond the limit are clipped to it. `dark` selects the palette for a dark page.
    """
    low, neutral, high = DARK if dark else LIGHT
    weight = min(abs(reward) / limit, 1.0) if limit > 0 and not math.isnan(reward) else 0.0
    end = high if reward > 0 else low
    return "#" + "".join(f"{round(n + weight * (e - n)):02x}" for n, e in zip(neutral, end))


def heatmap_html(scores: TokenScores, limit: float) -> Markup:
    """The token heatmap of one trace including its CSS, for a notebook or another page.

    Args:
        scores: the token rewards.
        limit: the |reward| (log-odds) with the strongest colour.
    """
    return Markup("<style>{}</style>{}").format(HEATMAP_CSS, token_spans(scores, limit, joined_text(scores)))


def token_spans(scores: TokenScores, limit: float, completion: str) -> Markup:
    """One span per token. The concatenated text is exactly `completion`: marks are added by CSS."""
    spans: list[Markup] = []
    shown = 0
    last = len(scores.tokens) - 1
    for i, (reward, supervised) in enumerate(zip(scores.rewards, scores.supervised)):
        start, end = scores.offsets[i]
        if start > shown:  # text not covered by a token
            spans.append(escape(completion[shown:start]))
            shown = start
        text = completion[shown:end]
        shown = max(shown, end)
        kind, name = "", text
        if not text:  # the end of the sequence, or a further byte token of a character that is already shown
            kind, name = (" e", "end of sequence") if i == last else (" z", "part of a character")
        elif text.startswith("\n"):
            kind, name = " n", text.replace("\n", "line break ")
        spans.append(
            Markup(
                '<span class="t{kind}{mark}" style="--l:{light};--d:{dark}" tabindex="0" role="img" '
                'aria-label="{name}: {reward}{note}" title="{reward}">{text}</span>'
            ).format(
                kind=kind,
                mark=" s" if supervised else "",
                light=reward_colour(reward, limit),
                dark=reward_colour(reward, limit, dark=True),
                name=name.strip() or "space",
                reward=signed(reward),
                note=", supervised" if supervised else "",
                text=text,
            )
        )
    spans.append(escape(completion[shown:]))
    return Markup('<div class="heat" role="group" aria-label="Token rewards" dir="auto">{}</div>').format(
        Markup("").join(spans)
    )


def joined_text(scores: TokenScores) -> str:
    """Reconstruct the completion by placing tokens at their offsets."""
    text = [" "] * max((end for _, end in scores.offsets), default=0)
    for token, (start, end) in zip(scores.tokens, scores.offsets):
        for i, character in enumerate(token[: end - start]):
            text[start + i] = character
    return "".join(text)


def signed(value: float) -> str:
    """A reward with its sign, e.g. ``+1.20`` or ``−0.35``."""
    return f"{value:+.2f}".replace("-", "−")
