"""CSS and JavaScript of a report."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21;
  --soft: #656b73; --line: #dfe2e6; --tile: #f5f6f8; --mark: #3f7fd6;
  --bad: #c8372d; }
@media (prefers-color-scheme: dark) { :root { --back: #15171a;
  --text: #e6e8ea; --soft: #9aa1a9; --line: #32363b; --tile: #1e2125; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1100px;
  background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', sans-serif; }
h1 { margin: 0; font-size: 1.8rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.15rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption, th, dt { color: var(--soft); }
.notice { color: var(--bad); }
.tiles { display: grid; gap: .6rem; margin: 1.5rem 0 0;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tiles div { padding: .7rem .9rem; border-radius: 8px;
  background: var(--tile); }
.tiles b { display: block; font-size: 1.65rem; font-weight: 600;
  line-height: 1.25; font-variant-numeric: tabular-nums; }
.tiles span { display: block; font-size: .82rem; color: var(--soft); }
.frame, .sheet { display: block; max-width: max(640px, 100%); height: auto;
  border-radius: 6px; }
.frame[hidden] { display: none; }
.photos { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
.photos img { display: block; width: 100%; height: auto; border-radius: 6px; }
input[type=range] { width: min(24rem, 100%); vertical-align: middle;
  accent-color: var(--mark); }
.plots, .levels { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); }
.levels { grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 96px;
  border-bottom: 1px solid var(--soft); border-left: 1px solid var(--soft); }
.bars i { flex: 1; min-width: 1px; background: var(--mark); }
.bars .dead { min-height: 4px; background: var(--bad); }
.histogram { display: grid; gap: 0 .25rem; margin-top: .3rem;
  grid-template-columns: auto auto minmax(0, 1fr);
  font-size: .75rem; line-height: 1.2; color: var(--soft); }
.histogram b { font-weight: 400; writing-mode: vertical-rl;
  transform: rotate(180deg); text-align: center; }
.histogram .below { grid-column: 3; writing-mode: horizontal-tb;
  transform: none; }
.scale { display: flex; flex-direction: column;
  justify-content: space-between; text-align: right; }
.ticks { grid-column: 3; display: flex; gap: 2px; }
.ticks i { flex: 1; min-width: 1px; white-space: nowrap; font-style: normal;
  display: flex; justify-content: center; }
.wide { overflow-x: auto; }
.scrolls::before { content: 'Scroll sideways \\2192'; position: sticky; left: 0;
  display: block; width: max-content; margin-bottom: .3rem; padding: 0 .5rem;
  border-radius: 3px; background: var(--mark); color: #fff; font-size: .8rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; }
td:nth-child(2) { font-variant-numeric: tabular-nums; }
@media (max-width: 640px) {
  tr { display: flex; flex-wrap: wrap; justify-content: space-between;
    padding: .35rem 0; border-bottom: 1px solid var(--line); }
  th:nth-child(3) { display: none; }
  th, td { padding: 0; border: 0; overflow-wrap: anywhere; }
  td:nth-child(3) { width: 100%; color: var(--soft); } }
details { margin: .1rem 0; }
dl + details { margin-top: .3rem; }
details details, details dl { margin-left: 1.1rem; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr;
  gap: .1rem 1rem; margin: .2rem 0; font-size: .88rem; }
dd { margin: 0; font-family: ui-monospace, monospace; min-width: 0;
  overflow-wrap: anywhere; }
@media (max-width: 640px) {
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin: 0 0 .3rem 1rem; } }
.pixels { image-rendering: pixelated; }
.cards { display: grid; gap: .9rem; margin: .8rem 0 1.4rem;
  grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); }
.codes { grid-template-columns: repeat(auto-fill, minmax(70px, 1fr)); }
.cards img { display: block; width: 100%; height: auto; border-radius: 4px; }
.cards img + img { margin-top: 3px; }
.wipes { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(230px, 100%), 1fr)); }
.wipe { position: relative; --cut: 50%; overflow: hidden;
  border-radius: 6px; }
.wipe:has(:focus-visible) {
  outline: 3px solid var(--mark); outline-offset: 2px; }
.wipe img { display: block; width: 100%; height: auto; }
.wipe .over { position: absolute; inset: 0;
  clip-path: inset(0 0 0 var(--cut)); }
.wipe::after { content: ''; position: absolute; top: 0; bottom: 0;
  left: var(--cut); width: 2px; margin-left: -1px; background: #fff;
  box-shadow: 0 0 0 1px #0008; pointer-events: none; }
.wipe input { position: absolute; top: 0; left: -8px; margin: 0;
  width: calc(100% + 16px); height: 100%; opacity: 0;
  cursor: ew-resize; touch-action: pan-y; }
.wipe b { position: absolute; bottom: .3rem; padding: 0 .35rem; color: #fff;
  background: #000a; border-radius: 3px; font-size: .72rem;
  font-weight: 500; pointer-events: none; }
.heat { width: auto; border-collapse: separate; border-spacing: 2px;
  font-variant-numeric: tabular-nums; }
.heat tr { display: table-row; }
.heat.small th, .heat.small td { min-width: 2.25rem; height: 2rem; }
.heat th, .heat td { display: table-cell; width: auto; padding: .2rem;
  min-width: 2.1rem; border: 0; border-radius: 3px; text-align: center;
  vertical-align: middle; font-weight: 400; color: var(--text); }
.heat th { color: var(--soft); }
.heat th img { display: block; width: 26px; height: 26px;
  margin: auto; border-radius: 3px; }
.small { font-size: .72rem; }
.heats { display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem; }
.heats figure { width: min-content; min-width: min(260px, 100%);
  max-width: 100%; }
.swap { display: grid; gap: 1.1rem; margin: 1.2rem 0 2.2rem;
  grid-template-columns: minmax(120px, 190px) minmax(0, 1fr); }
.whole { position: relative; }
.whole img { display: block; width: 100%; height: auto; border-radius: 4px; }
.whole i { position: absolute; outline: 2px solid #fff;
  box-shadow: 0 0 0 3px #000; }
.strips { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; }
.strips > div { min-width: 0; }
.strip { display: flex; gap: 6px; padding: 3px; }
.strip figure { flex: 0 0 76px; font-size: .75rem; line-height: 1.25; }
.strip img { display: block; width: 100%; height: auto; border-radius: 3px; }
.strip img + img { margin-top: 2px; }
.strip .own > img:first-child { outline: 3px solid var(--mark); }
.strip figcaption { font-size: .72rem; }
@media (max-width: 640px) {
  .swap { grid-template-columns: minmax(0, 1fr); }
  .whole { max-width: 190px; }
  .levels { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); } }
"""
SCRIPT = """
const slider = document.getElementById('slider');
if (slider) {
  const frames = document.querySelectorAll('.frame');
  slider.hidden = false;
  slider.oninput = () => {
    frames.forEach((frame, i) => { frame.hidden = i != slider.value; });
    document.getElementById('shown').value = frames[slider.value].alt;
  };
}
const boxes = document.querySelectorAll('.wide');
const mark = () => boxes.forEach((box) => {
  box.classList.toggle('scrolls', box.scrollWidth > box.clientWidth + 1);
});
addEventListener('resize', mark);
mark();
document.querySelectorAll('.wipe input').forEach((input) => {
  const move = () => {
    input.parentNode.style.setProperty('--cut', input.value + '%');
  };
  input.oninput = move;
  move();
});
"""
