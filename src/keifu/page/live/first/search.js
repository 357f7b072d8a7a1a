// What this element shows before a click; written by `node docs/_site/first_frames.mjs`.

export const FIRST = [{"text":" city of the city of the city of the city of the city of the city of the city of the city of the city of the city of the","logP":-39.7234,"ended":false},{"text":" United States.","logP":-4.4007,"ended":true},{"text":" Olympic and Bell Aburbis. It is believed that the population of the Li Aburg deity from","logP":-86.2728,"ended":false}];
