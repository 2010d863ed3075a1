/** What every key does. */

import type { Assistance } from "./assistance";
import { byId } from "./dom";
import type { Editor, Voice } from "./editor";
import type { Command } from "./keys";
import type { Panel } from "./panel";
import type { Store } from "./store";
import type { Toolbox } from "./toolbox";
import type { View } from "./view";

/** What keys act on. */
export interface Actions {
  readonly view: View;
  readonly editor: Editor;
  readonly panel: Panel;
  readonly store: Store;
  readonly toolbox: Toolbox;
  readonly assistance: Assistance;
  readonly voice: Voice;
  go(by: number): Promise<void>;
  undo(): void;
  enter(): void;
  escape(): void;
  toggleMasks(): void;
}

export function commandsOf(page: Actions): Command[] {
  const { view, editor, panel, store, toolbox } = page;
  const { options } = toolbox;
  const tool = (key: string, name: string, title: string): Command => ({
    keys: [key],
    shown: [key.toUpperCase()],
    group: "Tools",
    title,
    run: () => toolbox.use(name),
  });
  return [
    tool("c", "click", "Click: the assistant finds the object"),
    tool("x", "box", "Box around an object"),
    tool("p", "polygon", "Polygon, or a free outline"),
    tool("b", "brush", "Brush"),
    tool("e", "eraser", "Eraser"),
    tool("v", "select", "Select"),
    tool("k", "split", "Split by a line"),
    {
      keys: ["[", "BracketLeft"],
      shown: ["["],
      group: "Tools",
      title: "Smaller brush",
      run: () => toolbox.setRadius(options.radius / 1.25),
    },
    {
      keys: ["]", "BracketRight"],
      shown: ["]"],
      group: "Tools",
      title: "Larger brush",
      run: () => toolbox.setRadius(options.radius * 1.25),
    },
    {
      keys: ["i"],
      shown: ["I"],
      group: "Tools",
      title: "Background instead of object, and back",
      run: () => toolbox.setBackground(!options.background),
    },
    {
      keys: ["u"],
      shown: ["U"],
      group: "Tools",
      title: "One click per object, on or off",
      run: () => byId("single").click(),
    },
    {
      keys: ["Enter"],
      group: "Object",
      title: "Close the polygon; accept the suggestion; go on to the next object",
      run: () => page.enter(),
    },
    { keys: ["Escape"], group: "Object", title: "Drop what is begun; select nothing", run: () => page.escape() },
    { keys: ["w"], shown: ["W"], group: "Object", title: "Select the next object", run: () => panel.step(1) },
    { keys: ["q"], shown: ["Q"], group: "Object", title: "Select the previous object", run: () => panel.step(-1) },
    {
      keys: ["Delete", "Backspace"],
      group: "Object",
      title: "Delete; dismiss a suggestion",
      run: (event) => {
        if (event.key === "Backspace" && toolbox.tool.stepBack()) return;
        editor.remove();
      },
    },
    { keys: ["m"], shown: ["M"], group: "Object", title: "Merge the selected objects", run: () => editor.merge() },
    { keys: ["j"], shown: ["J"], group: "Object", title: "Split into connected parts", run: () => editor.split() },
    {
      keys: ["Digit1", "Digit2", "Digit3", "Digit4", "Digit5", "Digit6", "Digit7", "Digit8", "Digit9", "Digit0"],
      shown: ["1 to 0"],
      group: "Object",
      title: "Class 1 to 10 for the selection and for new objects",
      run: (event) => panel.chooseClass((Number(event.code.slice(-1)) + 9) % 10),
    },
    { keys: ["/", "Shift+/"], shown: ["/"], group: "Object", title: "Find or add a class", run: () => panel.find() },
    {
      keys: ["Control+a"],
      shown: ["Ctrl+A"],
      group: "Object",
      title: "Select all objects",
      run: () => store.select(store.objects.keys()),
    },
    { keys: ["Control+z"], shown: ["Ctrl+Z"], group: "Object", title: "Undo", run: () => page.undo() },
    {
      keys: ["Control+Shift+z", "Control+y"],
      shown: ["Ctrl+Shift+Z", "Ctrl+Y"],
      group: "Object",
      title: "Redo",
      run: () => editor.redo(),
    },
    {
      keys: ["a"],
      shown: ["A"],
      group: "Suggestions",
      title: "Accept all suggestions",
      run: () => editor.accept(true),
    },
    {
      keys: ["g"],
      shown: ["G"],
      group: "Suggestions",
      title: "Everything: suggest all objects",
      run: () => void page.assistance.suggest("everything"),
    },
    {
      keys: ["l"],
      shown: ["L"],
      group: "Suggestions",
      title: "Suggest objects like the selected one",
      run: () => void page.assistance.suggest("similar"),
    },
    { keys: [",", "PageUp"], shown: [","], group: "Image", title: "Previous image", run: () => void page.go(-1) },
    { keys: [".", "PageDown"], shown: ["."], group: "Image", title: "Next image", run: () => void page.go(1) },
    {
      keys: ["Shift+Enter"],
      group: "Image",
      title: "Done with this image, go to the next",
      run: () => {
        toolbox.tool.finish();
        editor.setDone(true);
        void page.go(1);
      },
    },
    { keys: ["+", "="], shown: ["+"], group: "Image", title: "Zoom in", run: () => view.zoomAt(1.4) },
    { keys: ["-"], group: "Image", title: "Zoom out", run: () => view.zoomAt(1 / 1.4) },
    { keys: ["f"], shown: ["F"], group: "Image", title: "Fit to window", run: () => view.fit() },
    { keys: ["h"], shown: ["H"], group: "Image", title: "Show or hide masks", run: () => page.toggleMasks() },
    {
      keys: ["Control+s"],
      shown: ["Ctrl+S"],
      group: "Image",
      title: "Everything is saved by itself; says whether it is",
      run: () => page.voice.say(byId("status").textContent!.trim()),
    },
    {
      keys: ["?"],
      group: "Image",
      title: "This sheet",
      run: () => byId<HTMLDialogElement>("help-dialog").showModal(),
    },
  ];
}

/** What is done with the pointer, for the help sheet. */
export const POINTER_HELP = [
  { group: "Mouse, pen and fingers", shown: ["Wheel", "Pinch"], title: "Zoom" },
  { group: "Mouse, pen and fingers", shown: ["Space+drag", "Middle button", "Two fingers"], title: "Move the image" },
  {
    group: "Mouse, pen and fingers",
    shown: ["Alt+click", "Right button"],
    title: "Background click; erase; take away",
  },
  {
    group: "Mouse, pen and fingers",
    shown: ["Shift+click"],
    title: "Select several (Select); refine (One click per object)",
  },
  { group: "Mouse, pen and fingers", shown: ["Ctrl+click"], title: "New object inside another" },
  { group: "Keyboard on the image", shown: ["Arrow keys"], title: "Move the cross; with Shift finely, with Ctrl far" },
  { group: "Keyboard on the image", shown: ["Space"], title: "Click, or begin and end a stroke, at the cross" },
  { group: "Keyboard on the image", shown: ["Shift+Space"], title: "Background click at the cross" },
];
