"""Draws the picture of the plan from the plan itself."""

from __future__ import annotations

from vllm_kvcrush.plan import Plan, cdiv


def picture() -> str:
    """Returns an SVG: blocks held against tokens computed, raw and under a budget of 0.25."""
    prompt, total, size = 6144, 7680, 32
    plan = Plan(0.25, prompt, size)
    held = peak = 0
    line = [(0, 0)]
    for n in range(size, total + 1, size):
        held += size
        line.append((n, cdiv(held, size)))
        peak = max(peak, cdiv(held, size))
        if plan.is_check(n) and plan.due(n, held):
            held = plan.held_after(n, held)
            line.append((n, cdiv(held, size)))
    width, height, left, bottom = 720, 260, 56, 40
    top = total // size

    def point(n: int, blocks: int) -> str:
        x = left + n / total * (width - left - 20)
        y = height - bottom - blocks / top * (height - bottom - 24)
        return f"{x:.1f},{y:.1f}"

    raw = f"{point(0, 0)} {point(total, top)}"
    kept = " ".join(point(n, b) for n, b in line)
    x_prompt = point(prompt, 0).split(",")[0]
    y_bound = point(0, plan.bound(total)).split(",")[1]
    y_raw = point(0, top).split(",")[1]
    base = height - bottom
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">
<rect width="{width}" height="{height}" fill="#fff"/>
<path d="M{left} 10V{base}H{width - 12}" fill="none" stroke="#444"/>
<line x1="{left}" y1="{y_bound}" x2="{width - 20}" y2="{y_bound}" stroke="#999" stroke-dasharray="4 4"/>
<line x1="{x_prompt}" y1="10" x2="{x_prompt}" y2="{base}" stroke="#ccc"/>
<polyline points="{raw}" fill="none" stroke="#b55" stroke-width="2"/>
<polyline points="{kept}" fill="none" stroke="#26a" stroke-width="2"/>
<text x="{left - 6}" y="{base}" text-anchor="end">0</text>
<text x="{left - 6}" y="{float(y_bound) + 4:.0f}" text-anchor="end">{plan.bound(total)}</text>
<text x="{left - 6}" y="{float(y_raw) + 4:.0f}" text-anchor="end">{top}</text>
<text x="{x_prompt}" y="{base + 16}" text-anchor="middle">prompt read: {prompt} tokens</text>
<text x="{width - 20}" y="{base + 16}" text-anchor="end">{total}</text>
<text x="{left + 8}" y="22" fill="#444">blocks held by one request</text>
<text x="{width - 280}" y="60" fill="#b55">plain vLLM</text>
<text x="{width - 280}" y="{float(y_bound) - 8:.0f}" fill="#26a">budget 0.25</text>
</svg>
"""  # noqa: E501
