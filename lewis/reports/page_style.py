"""The style sheet of the page of a run, for light and dark; it loads nothing."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16202c; --soft: #5b6878; --line: #dfe4ea; --track: #eef1f5;
  --base: #8793a3; --other: #4f7cc4; --ours: #d9580d; --cool: #1f5fa8; --good: #17803d; --bad: #c02626; --wait: #9a6700;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #0e1319; --card: #171e27; --ink: #e6ebf1; --soft: #97a4b4; --line: #2b3542; --track: #222b36;
  --base: #8c98a8; --other: #7ba7ea; --ours: #ff9350; --cool: #7cc0ff; --good: #4cc274; --bad: #ff7a73; --wait: #e3b341;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  "Noto Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 20px 60px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 18px 0 8px; overflow-wrap: anywhere; }
p { margin: 4px 0; } a { color: var(--other); }
.soft, .note { color: var(--soft); } .note { font-size: 13px; margin: 0 0 14px; }
code, pre { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
section, .tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 20px 22px; margin-top: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 14px; margin-top: 22px; }
.tiles > div { padding: 12px 16px; } .tiles b { display: block; font-size: 22px; line-height: 1.3; }
.mark { display: inline-block; border-radius: 99px; padding: 2px 12px; font-weight: 600; font-size: 13px;
  border: 1px solid currentColor; margin: 12px 8px 0 0; }
.good { color: var(--good); } .bad { color: var(--bad); } .wait { color: var(--wait); }
.row { display: grid; grid-template-columns: minmax(90px, 190px) 1fr 128px; gap: 14px; align-items: center;
  min-height: 27px; }
.row > :first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; text-align: right; }
.row > :last-child { font-variant-numeric: tabular-nums; white-space: nowrap; }
.ours > :first-child, .ours > :last-child { font-weight: 650; }
.track { position: relative; height: 20px; border-radius: 4px; background: var(--track); }
.track i { position: absolute; display: block; }
.reach { top: 8px; height: 4px; border-radius: 2px; background: var(--c); opacity: .38; }
.dot { top: 4px; width: 12px; height: 12px; margin-left: -6px; border-radius: 50%; background: var(--c); }
.ours .dot { top: 2px; width: 16px; height: 16px; margin-left: -8px; border: 3px solid var(--card); outline: 2px solid
  var(--c); outline-offset: -1px; }
.bar { top: 3px; height: 14px; min-width: 2px; border-radius: 3px; background: var(--c); }
.at { top: -3px; bottom: -3px; width: 2px; margin-left: -1px; background: var(--soft); }
.axis { color: var(--soft); font-size: 12px; min-height: 18px; } .axis span { display: flex; justify-content:
  space-between; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 22px; }
.map { display: grid; gap: 2px; align-items: center; font-size: 11px; color: var(--soft); }
.map i { height: 15px; border-radius: 2px; background: color-mix(in oklab, var(--cool) var(--v), var(--track)); }
.map i.none { background: none; border: 1px dashed var(--line); }
.map b { font-weight: 500; align-self: end; writing-mode: vertical-rl; transform: rotate(180deg); justify-self: center;
  max-height: 120px; overflow: hidden; white-space: nowrap; } .map span { text-align: right; padding-right: 4px; }
.scale { display: flex; align-items: center; gap: 8px; font-size: 12px; color: var(--soft); margin-top: 12px; }
.scale i { width: 130px; height: 10px; border-radius: 3px; background: linear-gradient(to right in oklab, var(--track),
  var(--cool)); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; } td, th { padding: 5px 16px 5px 0; border-bottom: 1px
  solid var(--line); white-space: nowrap; }
details { margin-top: 14px; } summary { cursor: pointer; color: var(--soft); font-size: 13px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; unicode-bidi: plaintext; }
details > pre { background: var(--track); border-radius: 6px; padding: 12px 14px; margin-top: 8px; }
.sample { border-top: 1px solid var(--line); padding: 14px 0 4px; margin-top: 12px; }
.sample .label { font-size: 12px; color: var(--soft); margin: 8px 0 3px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; } .pair > div { min-width: 0; }
.pair pre { background: var(--track); border-radius: 6px; padding: 9px 12px; border-left: 3px solid var(--line); }
.pair .good pre, .pair .bad pre { border-color: currentColor; } .pair pre code { color: var(--ink); }
.tree { width: 100%; height: auto; max-height: 900px; } .tree text { fill: var(--ink); font-size: 13px; }
.tree .small { fill: var(--soft); font-size: 11px; } .tree rect { fill: var(--track); stroke: var(--line); }
.tree path { fill: none; stroke: var(--soft); stroke-width: 1.5; opacity: .6; }
.tree .moved { stroke: var(--ours); stroke-width: 2; } .tree path.moved { opacity: 1; }
.rules { padding-left: 20px; margin: 8px 0 0; } .rules li { margin: 3px 0; }
.picture { background: #fff; border-radius: 8px; max-width: 100%; margin-top: 8px; }
@media (max-width: 640px) { .pair { grid-template-columns: 1fr; }
  .row { grid-template-columns: 92px 1fr 84px; gap: 8px; } }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
